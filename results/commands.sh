#!/usr/bin/env bash
# The commands behind results/README.md, each to be run from the top folder, alone or all of them.
# Every one writes a run folder of its own; `python results/keep.py RUN_FOLDER results/.../NAME.csv`
# then keeps what the figures need, and `python results/plot.py` draws them. A line whose folder holds a
# run already says so and is skipped; --resume FOLDER/checkpoint.pt in place of --run-dir goes on with it.

# a3c_atari.py: 2 processes x 8 games
python a3c_atari.py --env-id PongNoFrameskip-v4 --orthogonal-init --rmsprop-eps 1e-3 --num-workers 2 --envs-per-worker 8 --total-timesteps 8000000 --eval-episodes 30 --run-dir runs/a3c_atari/pong/orthogonal-init__seed1
python a3c_atari.py --env-id PongNoFrameskip-v4 --num-workers 2 --envs-per-worker 8 --total-timesteps 10000000 --eval-episodes 30 --run-dir runs/a3c_atari/pong/as-in-the-paper__seed1
python a3c_atari.py --num-workers 2 --envs-per-worker 8 --total-timesteps 20000000 --eval-episodes 30 --run-dir runs/a3c_atari/breakout

# async_nstep_q.py: 2 processes x 8 games
python async_nstep_q.py --env-id PongNoFrameskip-v4 --orthogonal-init --rmsprop-eps 1e-3 --num-workers 2 --envs-per-worker 8 --total-timesteps 10000000 --eval-episodes 30 --run-dir runs/async_nstep_q/pong/nstep-q__seed1
python async_nstep_q.py --algorithm onestep-q --env-id PongNoFrameskip-v4 --orthogonal-init --rmsprop-eps 1e-3 --num-workers 2 --envs-per-worker 8 --total-timesteps 4000000 --eval-episodes 30 --run-dir runs/async_nstep_q/pong/onestep-q__seed1
python async_nstep_q.py --algorithm onestep-sarsa --env-id PongNoFrameskip-v4 --orthogonal-init --rmsprop-eps 1e-3 --num-workers 2 --envs-per-worker 8 --total-timesteps 4000000 --eval-episodes 30 --run-dir runs/async_nstep_q/pong/onestep-sarsa__seed1

# a3c_continuous.py
for seed in 1 2 3; do
    python a3c_continuous.py --num-workers 2 --total-timesteps 500000 --eval-episodes 30 --report-every 10000 --seed $seed --run-dir runs/a3c_continuous/inverted_pendulum/seed$seed
    python a3c_continuous.py --env-id Pendulum-v1 --t-max 20 --discount 0.95 --num-workers 2 --total-timesteps 500000 --eval-episodes 30 --report-every 10000 --seed $seed --run-dir runs/a3c_continuous/pendulum/seed$seed
    python a3c_continuous.py --env-id Reacher-v5 --t-max 5 --discount 0.9 --reward-scale 0.1 --entropy-cost 1e-3 --num-workers 2 --total-timesteps 1000000 --eval-episodes 30 --report-every 20000 --seed $seed --run-dir runs/a3c_continuous/reacher/seed$seed
done
python a3c_continuous.py --env-id HalfCheetah-v5 --t-max 20 --learning-rate 1e-4 --entropy-cost 1e-3 --num-workers 2 --total-timesteps 10000000 --eval-episodes 30 --report-every 50000 --capture-video --run-dir runs/a3c_continuous/half_cheetah/seed1

# a3c_maze.py
python a3c_maze.py --num-workers 2 --total-timesteps 8000000 --eval-episodes 100 --capture-video --run-dir runs/a3c_maze/apples/seed1
python a3c_maze.py --evaluate runs/a3c_maze/apples/seed1/checkpoint.pt --eval-episodes 100
python a3c_maze.py --evaluate runs/a3c_maze/apples/seed1/checkpoint.pt --eval-episodes 200 --seed 2
python a3c_maze.py --evaluate runs/a3c_maze/apples/seed1/checkpoint.pt --eval-episodes 100 --random-walk

# prong.py: condition of the Fisher matrix
for seed in 1 2 3; do
    for method in sgd rmsprop prong; do
        python prong.py --task fisher --method $method --seed $seed --learning-rate 1e-2 --total-iterations 5000 --report-every 100 --run-dir runs/prong/fisher/${method}__seed$seed
    done
done

# prong.py: the autoencoder, each method as its tuning found best
for seed in 1 2 3; do
    python prong.py --seed $seed --batch-size 256 --total-iterations 10000 --report-every 250 --run-dir runs/prong/autoencoder/prong-256__seed$seed
    python prong.py --method prong+ --seed $seed --batch-size 256 --epsilon 1 --learning-rate 1e-2 --total-iterations 10000 --report-every 250 --run-dir runs/prong/autoencoder/prong+-256__seed$seed
    python prong.py --method batchnorm --seed $seed --batch-size 256 --learning-rate 1e-2 --total-iterations 10000 --report-every 250 --run-dir runs/prong/autoencoder/batchnorm-256__seed$seed
    python prong.py --method sgd --seed $seed --batch-size 256 --learning-rate 1e-2 --total-iterations 10000 --report-every 250 --run-dir runs/prong/autoencoder/sgd-256__seed$seed
    python prong.py --method rmsprop --seed $seed --batch-size 256 --rmsprop-eps 1e-2 --learning-rate 1e-3 --total-iterations 10000 --report-every 250 --run-dir runs/prong/autoencoder/rmsprop-256__seed$seed
done

# prong.py: the autoencoder with the paper's batch
for seed in 1 2 3; do
    python prong.py --seed $seed --total-iterations 10000 --report-every 250 --run-dir runs/prong/batch_128/prong__seed$seed
    python prong.py --method prong+ --seed $seed --epsilon 1 --learning-rate 1e-2 --total-iterations 10000 --report-every 250 --run-dir runs/prong/batch_128/prong+__seed$seed
    python prong.py --method sgd --seed $seed --learning-rate 1e-2 --total-iterations 10000 --report-every 250 --run-dir runs/prong/batch_128/sgd__seed$seed
    python prong.py --method rmsprop --seed $seed --rmsprop-eps 1e-2 --learning-rate 1e-3 --total-iterations 10000 --report-every 250 --run-dir runs/prong/batch_128/rmsprop__seed$seed
done

# prong.py: updates between two whitenings (1,000: batch_128/prong above), one at the start, and none
# at all (centred and scaled)
for period in 10 100; do
    python prong.py --whitening-period $period --total-iterations 10000 --report-every 250 --run-dir runs/prong/period/${period}__seed1
done
python prong.py --whitening-period 10000 --total-iterations 10000 --report-every 250 --run-dir runs/prong/period/once__seed1
python results/prong_scaled.py --total-iterations 10000 --report-every 250 --run-dir runs/prong/period/scaled__seed1

# prong.py: CIFAR-10 with equal updates
python prong.py --task cifar10 --batch-size 64 --total-iterations 40000 --run-dir runs/prong/cifar10/prong__seed1
python prong.py --task cifar10 --method batchnorm --batch-size 64 --learning-rate 1e-2 --total-iterations 40000 --run-dir runs/prong/cifar10/batchnorm__seed1
python prong.py --task cifar10 --method sgd --batch-size 64 --learning-rate 1e-2 --total-iterations 40000 --run-dir runs/prong/cifar10/sgd__seed1

# bayes_by_backprop.py: MNIST
for seed in 1 2 3; do
    python bayes_by_backprop.py --seed $seed --run-dir runs/bayes_by_backprop/mnist/mixture__seed$seed
    python bayes_by_backprop.py --prior gaussian --prior-sigma-1 0.368 --seed $seed --run-dir runs/bayes_by_backprop/mnist/gaussian__seed$seed
    for method in dropout sgd; do
        python bayes_by_backprop.py --method $method --seed $seed --run-dir runs/bayes_by_backprop/mnist/${method}__seed$seed
    done
done
python bayes_by_backprop.py --hidden-units 1200 --prior-sigma-1 0.368 --prior-sigma-2 0.00248 --kl-weighting uniform --rho-init -5 --learning-rate-decay 0.95 --epochs 60 --run-dir runs/bayes_by_backprop/mnist/pruning-1200__seed1
python bayes_by_backprop.py --method sgd --optimizer sgd --learning-rate 0.1 --learning-rate-decay 0.985 --epochs 300 --run-dir runs/bayes_by_backprop/mnist/sgd-by-sgd__seed1

# bayes_by_backprop.py: MNIST, 600 epochs on a GPU
for seed in 1 2 3; do
    python bayes_by_backprop.py --epochs 600 --learning-rate-decay 0.99324 --seed $seed --run-dir runs/bayes_by_backprop/mnist_600/mixture__seed$seed
    for method in dropout sgd; do
        python bayes_by_backprop.py --epochs 600 --learning-rate-decay 0.99324 --method $method --seed $seed --run-dir runs/bayes_by_backprop/mnist_600/${method}__seed$seed
    done
done

# bayes_by_backprop.py: the regression of figure 5
for seed in 1 2 3; do
    python bayes_by_backprop.py --task regression --seed $seed --prior gaussian --prior-sigma-1 1 --kl-weighting uniform --rho-init -3 --samples 5 --learning-rate 5e-3 --epochs 1000 --run-dir runs/bayes_by_backprop/regression__seed$seed
done

# bayes_by_backprop.py: mushrooms
python bayes_by_backprop.py --task bandit --prior gaussian --prior-sigma-1 0.368 --kl-weighting uniform --rho-init -3 --run-dir runs/bayes_by_backprop/bandit/bbb-50000__seed1
for seed in 1 2 3; do
    python bayes_by_backprop.py --task bandit --seed $seed --prior gaussian --prior-sigma-1 0.368 --kl-weighting uniform --rho-init -3 --interactions 10000 --run-dir runs/bayes_by_backprop/bandit/bbb__seed$seed
    for agent in greedy greedy-1 greedy-5; do
        python bayes_by_backprop.py --task bandit --agent $agent --seed $seed --interactions 10000 --run-dir runs/bayes_by_backprop/bandit/${agent}__seed$seed
    done
done

# policy_distillation.py: teachers
python policy_distillation.py --stage teacher --env-ids FreewayNoFrameskip-v4 --total-timesteps 350000 --epsilon-timesteps 100000 --final-epsilon 0.01 --target-period 1000 --learning-starts 10000 --optimizer adam --learning-rate 1e-4 --run-dir runs/policy_distillation/freeway_teacher
python policy_distillation.py --stage teacher --env-ids QbertNoFrameskip-v4 --total-timesteps 350000 --epsilon-timesteps 100000 --final-epsilon 0.01 --target-period 1000 --learning-starts 10000 --optimizer adam --learning-rate 1e-4 --run-dir runs/policy_distillation/qbert_teacher

# policy_distillation.py: students
for game in freeway qbert; do
    for student in net2 net1 net3; do
        python policy_distillation.py --student $student --total-rounds 4 --eval-every 2 --teachers runs/policy_distillation/${game}_teacher/checkpoint.pt --run-dir runs/policy_distillation/$game/kl-${student}__seed1
    done
    for loss in nll mse; do
        python policy_distillation.py --loss $loss --student net2 --total-rounds 4 --eval-every 2 --teachers runs/policy_distillation/${game}_teacher/checkpoint.pt --run-dir runs/policy_distillation/$game/$loss-net2__seed1
    done
done
python policy_distillation.py --total-rounds 8 --eval-every 2 --teachers runs/policy_distillation/freeway_teacher/checkpoint.pt runs/policy_distillation/qbert_teacher/checkpoint.pt --run-dir runs/policy_distillation/two_games/kl-multi3__seed1
python policy_distillation.py --stage teacher --total-timesteps 350000 --epsilon-timesteps 100000 --final-epsilon 0.01 --target-period 1000 --learning-starts 10000 --optimizer adam --learning-rate 1e-4 --teachers runs/policy_distillation/freeway_teacher/checkpoint.pt runs/policy_distillation/qbert_teacher/checkpoint.pt --run-dir runs/policy_distillation/multi_dqn/seed1

# gorila_dqn.py: how layers begin
python results/gorila_first_weights.py

# straw.py: mazes of 11x11
python straw.py --model straw --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --commitment-cost 5e-4 --total-timesteps 10000000 --run-dir runs/straw/maze_11/straw__seed1
python straw.py --model strawe --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --commitment-cost 5e-4 --total-timesteps 10000000 --run-dir runs/straw/maze_11/strawe__seed1
python straw.py --model lstm --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --total-timesteps 10000000 --run-dir runs/straw/maze_11/lstm__seed1
python straw.py --model ff --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --total-timesteps 10000000 --run-dir runs/straw/maze_11/ff__seed1

# straw.py: mazes of 11x11, gates that are not learned
python straw.py --model straw --replan always --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --total-timesteps 10000000 --run-dir runs/straw/ablations/always__seed1
python straw.py --model straw --replan random --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --total-timesteps 10000000 --run-dir runs/straw/ablations/random__seed1

# straw.py: mazes of 15x15
python straw.py --model straw --maze-size 15 --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --commitment-cost 1e-4 --commitment-bias 3 --total-timesteps 10000000 --run-dir runs/straw/maze_15/straw__seed1
python straw.py --model lstm --maze-size 15 --num-workers 1 --envs-per-worker 8 --curriculum-period 200000 --learning-rate 1e-3 --rmsprop-eps 1e-4 --discount 0.95 --total-timesteps 10000000 --run-dir runs/straw/maze_15/lstm__seed1

# straw.py: text
python straw.py --task text --model straw --dataset tinyshakespeare --optimizer adam --max-extent 3 --commitment-entry 1 --commitment-cost 0.02 --total-timesteps 12000000 --run-dir runs/straw/text/straw-0.02__seed1
python straw.py --task text --model straw --dataset tinyshakespeare --optimizer adam --max-extent 3 --commitment-entry 1 --commitment-cost 0.1 --total-timesteps 10000000 --run-dir runs/straw/text/straw-0.1__seed1
python straw.py --task text --model lstm --dataset tinyshakespeare --optimizer adam --total-timesteps 12000000 --run-dir runs/straw/text/lstm__seed1

# spatial_transformer_mnist.py: fully connected classifiers, then convolutional ones
for seed in 1 2 3; do
    python spatial_transformer_mnist.py --transform none --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --total-iterations 10000 --report-every 500 --run-dir runs/spatial_transformer_mnist/R_fcn/none__seed$seed
    for transform in affine tps; do
        python spatial_transformer_mnist.py --transform $transform --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 10000 --report-every 500 --run-dir runs/spatial_transformer_mnist/R_fcn/${transform}__seed$seed
    done
done
for seed in 1 2 3; do
    for distortion in RTS P E TC; do
        python spatial_transformer_mnist.py --distortion $distortion --transform none --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --total-iterations 10000 --report-every 500 --run-dir runs/spatial_transformer_mnist/${distortion}_fcn/none__seed$seed
    done
    for transform in affine tps; do
        python spatial_transformer_mnist.py --distortion RTS --transform $transform --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 10000 --report-every 500 --run-dir runs/spatial_transformer_mnist/RTS_fcn/${transform}__seed$seed
        for distortion in P E; do
            python spatial_transformer_mnist.py --distortion $distortion --transform $transform --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.01 --total-iterations 10000 --report-every 500 --run-dir runs/spatial_transformer_mnist/${distortion}_fcn/${transform}__seed$seed
        done
    done
    python spatial_transformer_mnist.py --distortion TC --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.01 --total-iterations 10000 --report-every 500 --run-dir runs/spatial_transformer_mnist/TC_fcn/affine__seed$seed
done
for seed in 1 2 3; do
    python spatial_transformer_mnist.py --model cnn --bfloat16 --transform none --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --total-iterations 3000 --report-every 500 --run-dir runs/spatial_transformer_mnist/R_cnn/none__seed$seed
    for transform in affine tps; do
        python spatial_transformer_mnist.py --model cnn --bfloat16 --transform $transform --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 3000 --report-every 500 --run-dir runs/spatial_transformer_mnist/R_cnn/${transform}__seed$seed
    done
done
for seed in 1 2 3; do
    for distortion in RTS P E TC; do
        python spatial_transformer_mnist.py --model cnn --bfloat16 --distortion $distortion --transform none --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --total-iterations 3000 --report-every 500 --run-dir runs/spatial_transformer_mnist/${distortion}_cnn/none__seed$seed
    done
    for transform in affine tps; do
        python spatial_transformer_mnist.py --model cnn --bfloat16 --distortion RTS --transform $transform --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 3000 --report-every 500 --run-dir runs/spatial_transformer_mnist/RTS_cnn/${transform}__seed$seed
        for distortion in P E; do
            python spatial_transformer_mnist.py --model cnn --bfloat16 --distortion $distortion --transform $transform --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.01 --total-iterations 3000 --report-every 500 --run-dir runs/spatial_transformer_mnist/${distortion}_cnn/${transform}__seed$seed
        done
    done
    python spatial_transformer_mnist.py --model cnn --bfloat16 --distortion TC --seed $seed --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.01 --total-iterations 3000 --report-every 500 --run-dir runs/spatial_transformer_mnist/TC_cnn/affine__seed$seed
done
python spatial_transformer_mnist.py --model cnn --bfloat16 --distortion TC --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.01 --total-iterations 9000 --report-every 500 --run-dir runs/spatial_transformer_mnist/TC_cnn/affine-9000__seed1
python spatial_transformer_mnist.py --model cnn --bfloat16 --distortion TC --optimizer adam --learning-rate 0.001 --localisation-learning-rate 0.001 --total-iterations 3000 --report-every 500 --run-dir runs/spatial_transformer_mnist/TC_cnn/affine-adam__seed1
python spatial_transformer_mnist.py --model cnn --bfloat16 --distortion TC --optimizer adam --learning-rate 0.001 --localisation-learning-rate 0.001 --total-iterations 9000 --report-every 500 --run-dir runs/spatial_transformer_mnist/TC_cnn/affine-adam-9000__seed1

# spatial_transformer_mnist.py: 150,000 updates, on a GPU but for the first
python spatial_transformer_mnist.py --transform none --learning-rate 0.03 --sgd-momentum 0.9 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/R_fcn_long/none__seed1
python spatial_transformer_mnist.py --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/R_fcn_long/affine__seed1
python spatial_transformer_mnist.py --distortion RTS --transform none --learning-rate 0.03 --sgd-momentum 0.9 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/RTS_fcn_long/none__seed1
python spatial_transformer_mnist.py --distortion RTS --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/RTS_fcn_long/affine__seed1
python spatial_transformer_mnist.py --distortion RTS --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.01 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/RTS_fcn_long/affine-0.01__seed1
python spatial_transformer_mnist.py --model cnn --bfloat16 --transform none --learning-rate 0.03 --sgd-momentum 0.9 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/R_cnn_long/none__seed1
python spatial_transformer_mnist.py --model cnn --bfloat16 --learning-rate 0.03 --sgd-momentum 0.9 --localisation-learning-rate 0.03 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/R_cnn_long/affine__seed1

# spatial_transformer_mnist.py: the sum of two digits, on a GPU (to 120,000 updates), then on a core
python spatial_transformer_mnist.py --task addition --num-transformers 2 --optimizer adam --learning-rate 0.001 --localisation-learning-rate 0.001 --total-iterations 150000 --report-every 5000 --run-dir runs/spatial_transformer_mnist/addition_fcn_long/affine-2__seed1
python spatial_transformer_mnist.py --task addition --transform none --optimizer adam --learning-rate 0.001 --total-iterations 20000 --report-every 1000 --run-dir runs/spatial_transformer_mnist/addition_fcn/none__seed1
python spatial_transformer_mnist.py --task addition --optimizer adam --learning-rate 0.001 --localisation-learning-rate 0.001 --total-iterations 20000 --report-every 1000 --run-dir runs/spatial_transformer_mnist/addition_fcn/affine__seed1
python spatial_transformer_mnist.py --task addition --num-transformers 2 --optimizer adam --learning-rate 0.001 --localisation-learning-rate 0.001 --total-iterations 20000 --report-every 1000 --run-dir runs/spatial_transformer_mnist/addition_fcn/affine-2__seed1

# cyclic_rotation_cnn.py: turned digits
for variant in baseline half pool roll-all roll-dense; do
    for seed in 1 2 3; do
        python cyclic_rotation_cnn.py --bfloat16 --variant $variant --epochs 20 --seed $seed --run-dir runs/cyclic_rotation_cnn/rotated-mnist/${variant}__seed$seed
    done
done

python cyclic_rotation_cnn.py --bfloat16 --variant baseline --epochs 80 --eval-every 20 --run-dir runs/cyclic_rotation_cnn/rotated-mnist/baseline-80__seed1

# cyclic_rotation_cnn.py: plankton, on a GPU and, smaller, on a processor
for variant in baseline pool; do
    python cyclic_rotation_cnn.py --dataset plankton --bfloat16 --variant $variant --epochs 36 --eval-every 4 --run-dir runs/cyclic_rotation_cnn/plankton_95/${variant}__seed1
done
for variant in baseline half pool roll-all roll-dense; do
    python cyclic_rotation_cnn.py --dataset plankton --image-size 47 --bfloat16 --variant $variant --epochs 10 --eval-every 2 --run-dir runs/cyclic_rotation_cnn/plankton/${variant}__seed1
done

# multi_object_attention.py: pairs and sums
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --learning-rate-decay 0.984 --epochs 200 --no-hold-out --bfloat16 --run-dir runs/multi_object_attention/pairs/dram-60000__seed1
python multi_object_attention.py --task addition --batch-size 256 --learning-rate 0.002 --learning-rate-decay 0.984 --epochs 200 --no-hold-out --bfloat16 --run-dir runs/multi_object_attention/addition/dram-60000__seed1

# multi_object_attention.py: the same on a GPU, other models and patches
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --learning-rate-decay 0.98 --epochs 160 --eval-every 10 --run-dir runs/multi_object_attention/pairs/dram__seed1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --epochs 120 --context none --eval-every 20 --run-dir runs/multi_object_attention/pairs/no-context__seed1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --epochs 120 --model ram --eval-every 20 --run-dir runs/multi_object_attention/pairs/ram__seed1
python multi_object_attention.py --task addition --batch-size 256 --learning-rate 0.002 --learning-rate-decay 0.98 --epochs 160 --eval-every 10 --run-dir runs/multi_object_attention/addition/dram__seed1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --num-scales 4 --eval-every 10 --run-dir runs/multi_object_attention/pairs_wide/dram__seed1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --num-scales 4 --context none --eval-every 10 --run-dir runs/multi_object_attention/pairs_wide/no-context__seed1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --num-scales 4 --model ram --eval-every 10 --run-dir runs/multi_object_attention/pairs_wide/ram__seed1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --num-scales 4 --glimpse-policy random --eval-every 10 --run-dir runs/multi_object_attention/pairs_wide/random__seed1
python multi_object_attention.py --task addition --batch-size 256 --learning-rate 0.002 --epochs 30 --learning-rate-decay 0.9 --model conv --bfloat16 --eval-every 20 --run-dir runs/multi_object_attention/addition/conv__seed1
# tried, see the tables of results/README.md
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --learning-rate-decay 0.98 --epochs 160 --location-std 0.1
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --learning-rate-decay 0.98 --epochs 160 --patch-size 16
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --epochs 120
python multi_object_attention.py --batch-size 256 --learning-rate 0.002 --num-scales 3
python multi_object_attention.py --task addition --batch-size 256 --learning-rate 0.002 --epochs 120
# not measured: three archives, 2.7 GB, go into data/svhn first
python multi_object_attention.py --task svhn --forward-backward
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE

# recurrent_visual_attention.py: digits and Catch
for seed in 1 2 3; do
    python recurrent_visual_attention.py --seed $seed --eval-every 10 --run-dir runs/recurrent_visual_attention/mnist/seed$seed
    python recurrent_visual_attention.py --task translated --seed $seed --eval-every 10 --run-dir runs/recurrent_visual_attention/translated/seed$seed
    python recurrent_visual_attention.py --task catch --epochs 300 --seed $seed --eval-every 20 --run-dir runs/recurrent_visual_attention/catch/seed$seed
done
python recurrent_visual_attention.py --task cluttered --epochs 200 --glimpse-policy random --eval-every 10 --run-dir runs/recurrent_visual_attention/cluttered/random__seed1
python recurrent_visual_attention.py --task cluttered --epochs 200 --eval-every 10 --run-dir runs/recurrent_visual_attention/cluttered/ram__seed1
python recurrent_visual_attention.py --task cluttered --epochs 100 --model conv
python recurrent_visual_attention.py --task cluttered --epochs 400 --model conv --eval-every 10 --run-dir runs/recurrent_visual_attention/cluttered/conv__seed1
python recurrent_visual_attention.py --task cluttered100 --epochs 200 --eval-every 10 --run-dir runs/recurrent_visual_attention/cluttered100/seed1
