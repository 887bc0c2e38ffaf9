"""Gorila's first weights: how soon minibatches of Pong, played at random, teach its rewards.

    python results/gorila_first_weights.py

Its actor, replay memory, learner and server without Ray: 39,000 steps, then 4,000 updates, the same
minibatches for each line. Prints the mean loss of each thousand; knowing nothing has about 0.011.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gorila_dqn as g

STEPS, UPDATES = 39_000, 4_000
FLAGS = {"env_id": "PongNoFrameskip-v4", "num_actors": 1, "num_learners": 1, "final_epsilon": 1.0}
FLAGS |= {"replay_capacity": 40_000, "learning_starts": 1, "steps_per_update": 1}


def start(args: g.Args, folder: str) -> tuple[g.DeepQNetwork, g.ParameterServer]:
    """A network and a server of one shard that begins with its parameters, kept in folder."""
    torch.manual_seed(args.seed)
    net = g.DeepQNetwork(6, args.orthogonal_init)
    theta = g.flat(net.parameters())
    path = Path(folder, "shard.npz")
    G = np.full_like(theta, args.adagrad_start)
    g.write_slice(path, theta=theta, G=G, version=0, stale=0, lost=0)
    return net, g.ParameterServer([g.ParameterServerShard(path, args)])


def main(folder: str) -> None:
    _, server = start(g.Args(**FLAGS), folder)
    memory = g.ReplayMemory(1, g.Args(**FLAGS))
    g.Actor(0, 6, g.Args(**FLAGS), server, memory).play(STEPS)
    print("| layers begin | rate |" + "".join(f" to {n + 1},000 |" for n in range(UPDATES // 1000)))
    print("|---|--:|" + "--:|" * (UPDATES // 1000))
    for orthogonal, rate in ((False, 1e-2), (True, 1e-2), (False, 2e-2), (True, 2e-2)):
        flags = {"orthogonal_init": orthogonal, "learning_rate": rate, "target_period": 250}
        Path(folder, "shard.count").unlink()  # of the line before
        net, server = start(g.Args(**FLAGS, **flags), folder)
        memory.generator, memory.surplus = np.random.default_rng(1), STEPS
        learner = g.Learner(6, g.Args(**FLAGS, **flags), server, memory, net=net)
        for _ in range(UPDATES):
            learner.learn()
        losses = [value for tag, value in learner.log if tag == "losses/td_loss"]
        means = np.reshape(losses, (-1, 1000)).mean(1)
        how = "orthogonal" if orthogonal else "as torch's"
        print(f"| {how} | {rate:g} |" + "".join(f" {mean:.4f} |" for mean in means), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
