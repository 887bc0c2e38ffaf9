"""cyclic_rotation_cnn.py against the paper's identities, double loops, scikit-learn and its runs.

Public mistakes that these tests would catch: a roll that turns the wrong way (no test of invariance
sees it), a shift in the wrong direction, interleaved paths, pooling that breaks the symmetry,
independent statistics per path, an evaluation with dropout.
"""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT
from sklearn.metrics import root_mean_squared_error
from torch import nn

import cyclic_rotation_cnn as cyclic
from cyclic_rotation_cnn import (
    Args,
    CyclicNetwork,
    CyclicPool,
    CyclicRoll,
    CyclicSlice,
    CyclicStack,
    layout_of,
)

TINY = {"dataset": "digits", "epochs": 2, "eval_every": 1}
SLICED = ("pool", "roll-all", "roll-dense")


def r(x, k=1):
    """Clockwise quarter turns, by transposition and mirror."""
    for _ in range(k % 4):
        x = x.transpose(-2, -1).flip(-1)
    return x


def s(x, k=1):
    paths = list(x.chunk(4))
    return torch.cat(paths[k % 4 :] + paths[: k % 4])


def paths(B=2, C=3, S=6, seed=0):
    return torch.randn(4 * B, C, S, S, generator=torch.Generator().manual_seed(seed)).double()


# ---- The layers ---------------------------------------------------------------------------------


def test_math_turns_are_clockwise():
    x = torch.tensor([[[[1.0, 2], [3, 4]]]])
    assert cyclic.turn(x, 1).tolist() == [[[[3, 1], [4, 2]]]]
    for k in range(-3, 5):
        assert torch.equal(cyclic.turn(x, k), r(x, k))
    features = torch.rand(4, 5)
    assert cyclic.turn(features, 1) is features


def test_math_slice_makes_four_paths_and_turns_become_shifts():
    x = torch.randn(2, 3, 5, 5)
    S = CyclicSlice()
    assert torch.equal(S(x), torch.cat([x, r(x), r(x, 2), r(x, 3)]))
    assert torch.equal(S(r(x)), s(S(x)))


@pytest.mark.parametrize("how", ["mean", "max", "rms"])
def test_math_pool_against_a_loop(how):
    x = paths()
    aligned = torch.stack([r(x[2 * k : 2 * k + 2], -k) for k in range(4)])
    expected = {"mean": aligned.mean(0), "max": aligned.amax(0)}.get(how)
    if how == "rms":
        expected = sum(part**2 / 4 for part in aligned).sqrt()
    torch.testing.assert_close(CyclicPool(how)(x), expected)
    dense = torch.randn(8, 5).double()
    pooled = CyclicPool(how)(dense)
    assert pooled.shape == (2, 5)
    for k in range(4):
        torch.testing.assert_close(CyclicPool(how)(s(dense, k)), pooled)
        torch.testing.assert_close(CyclicPool(how)(s(x, k)), r(expected, k))  # as it turns


def test_math_stack_against_a_double_loop():
    x = paths()
    T = CyclicStack()(x)
    assert T.shape == (2, 12, 6, 6)
    for b, k in itertools.product(range(2), range(4)):
        assert torch.equal(T[b, 3 * k : 3 * k + 3], r(x[2 * k + b], -k))


@pytest.mark.parametrize("dense", [False, True])
def test_math_roll_is_four_stacks_of_shifted_paths(dense):
    x = torch.randn(8, 5).double() if dense else paths()
    R, T = CyclicRoll(), CyclicStack()
    assert torch.equal(R(x), torch.cat([T(s(x, k)) for k in range(4)]))
    for k in range(4):
        assert torch.equal(R(s(x, k)), s(R(x), k))
    C = x.shape[1]
    for path, j in itertools.product(range(4), range(4)):
        block = R(x).chunk(4)[path][:, j * C : j * C + C]
        source = x.chunk(4)[(path + j) % 4]
        assert torch.equal(block, source if dense else r(source, -j))


def test_math_roll_aligns_what_an_identity_convolution_leaves():
    """The four blocks of R(S(x)) are equal; turned the wrong way they are not."""
    x = torch.randn(2, 3, 6, 6)
    blocks = CyclicRoll()(CyclicSlice()(x)).chunk(4, dim=1)
    assert all(torch.equal(block, blocks[0]) for block in blocks)
    wrong = torch.cat([r(s(CyclicSlice()(x), j), j) for j in range(4)], 1).chunk(4, dim=1)
    assert not torch.equal(wrong[1], wrong[0])


def test_math_max_pooling_and_roll_change_places():
    x = paths(S=7)
    pool = nn.MaxPool2d(3, 2)
    assert torch.equal(CyclicRoll()(pool(x)), pool(CyclicRoll()(x)))


# ---- The networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset, outputs, counts",
    [
        ("plankton", 121, (2_840_409, 823_017, 2_840_409, 953_649, 2_283_097)),
        ("galaxies", 37, (14_572_741, 4_751_221, 14_572_741, 6_847_309, 14_571_717)),
        ("buildings", 1, (582_977, 150_945, 582_977, 158_417, None, 597_921)),
    ],
)
def test_math_networks_have_the_papers_parameters(dataset, outputs, counts):
    variants = ("baseline", "half", "pool", "roll-all", "roll-dense", "roll-half")
    for variant, count in zip(variants, counts):
        if count:
            with torch.device("meta"):
                net = CyclicNetwork(layout_of(dataset), variant, outputs)
            assert sum(p.numel() for p in net.parameters()) == count, variant


def use(monkeypatch, layout):
    monkeypatch.setattr(cyclic, "layout_of", lambda dataset: layout)


def small(dataset, size=0):
    layout = layout_of(dataset)
    stages = tuple(tuple(8 for _ in stage) for stage in layout.stages)
    dense = (16 if layout.dense[0] else 0, 16)
    return layout._replace(stages=stages, dense=dense, size=size or layout.size)


@pytest.mark.parametrize("dataset", ["rotated-mnist", "plankton", "galaxies", "buildings"])
@pytest.mark.parametrize("variant", ["baseline", *SLICED, "roll-half"])
def test_math_sliced_networks_are_invariant_also_after_training(dataset, variant):
    if (variant == "roll-half" and dataset != "buildings") or (
        variant == "roll-dense" and dataset == "buildings"
    ):
        return
    if variant == "baseline" and dataset != "rotated-mnist":
        return  # a new deep network says nearly the same of every picture
    torch.manual_seed(0)
    net = CyclicNetwork(small(dataset), variant, 5 if dataset != "buildings" else 1)
    layout = layout_of(dataset)
    x = torch.rand(3, layout.channels, layout.size, layout.size)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(4):
        net.eval()
        with torch.no_grad():
            for k in range(1, 4):
                turned = net(r(x, k))
                difference = (turned - r(net(x), k) if turned.dim() == 4 else turned - net(x)).abs()
                if variant == "baseline":
                    assert difference.max() > 1e-4
                else:
                    assert difference.max() < 1e-5 * max(1, turned.abs().max())
        net.train()
        loss = (net(x) - step).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("dataset", ["rotated-mnist", "plankton", "galaxies", "buildings"])
def test_math_filters_that_turn_do_what_rolls_do(dataset):
    """The same output and the same gradients, from the same parameters."""
    outputs, layout = 5 if dataset != "buildings" else 1, small(dataset)
    nets = [CyclicNetwork(layout, "roll-all", outputs, "mean", how) for how in ("maps", "filters")]
    for ours, theirs in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
        ours.data.copy_(theirs)
    x = torch.rand(2, layout.channels, layout.size, layout.size)
    answers = [net.eval().double()(x.double()) for net in nets]
    torch.testing.assert_close(*answers)
    for answer in answers:
        answer.square().sum().backward()
    for ours, theirs in zip(nets[1].parameters(), nets[0].parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_math_unstack_is_the_inverse_of_stack():
    assert torch.equal(cyclic.CyclicUnstack()(CyclicStack()(paths())), paths())


def test_math_layers_stand_in_the_papers_order():
    """Slice first; rolls after all convolutions and the first dense layer; pool before the last."""
    net = CyclicNetwork(layout_of("plankton"), "roll-all", 121, turned="maps")
    kinds = [type(layer).__name__ for layer in net]
    assert kinds[0] == "CyclicSlice" and kinds.count("CyclicRoll") == 11
    assert kinds[-3:] == ["CyclicPool", "Dropout", "Linear"] and kinds.count("Dropout") == 3
    assert kinds.count("MaxPool2d") == 4
    kinds = [
        type(layer).__name__ for layer in CyclicNetwork(layout_of("plankton"), "baseline", 121)
    ]
    assert not {"CyclicSlice", "CyclicRoll", "CyclicPool"} & set(kinds)
    assert kinds[-3:] == ["ReLU", "Dropout", "Linear"]
    net = CyclicNetwork(layout_of("buildings"), "pool", 1)
    assert net(torch.zeros(1, 3, 80, 80)).shape == (1, 1, 40, 40)


# ---- Data ---------------------------------------------------------------------------------------


def test_math_warp_turns_by_every_angle():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(4000, 1, 29, 29)
    x[:, :, 13:16, 22:25] = 1  # right of the middle
    out = cyclic.warp(x, generator)
    p = torch.arange(29) - 14.0
    mass = out.sum((1, 2, 3))
    centre = (
        torch.stack([(out.sum(2) * p).sum((1, 2)), (out.sum(3) * p).sum((1, 2))], 1) / mass[:, None]
    )
    assert (centre.norm(dim=1) - 9).abs().max() < 0.3
    quarters = torch.histc(torch.atan2(centre[:, 1], centre[:, 0]), 8, -np.pi, np.pi)
    assert (quarters - 500).abs().max() < 5 * 500**0.5
    torch.manual_seed(0)
    wide = cyclic.warp(x, shift=0.1, stretch=1.3, shear=15.0, flips=True)
    assert wide.shape == x.shape and not torch.equal(wide, out)


def test_math_rotated_digits_are_the_same_in_every_run():
    (train, test), (again, _) = (cyclic.load_rotated(Args(**TINY)) for _ in range(2))
    assert train.x.shape == (1300, 1, 28, 28) and len(test.x) == 497
    assert torch.equal(train.x, again.x) and train.x.dtype == torch.uint8


def save_picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_plankton(folder, classes=3, each=12):
    generator = np.random.default_rng(0)
    for c in range(classes):
        for i in range(each):
            picture = np.full((30 + i, 20 + 5 * c), 255, np.uint8)
            picture[5 : 15 + 5 * c, 5:12] = generator.integers(0, 50)
            save_picture(folder / f"plankton/train/class_{c}/{i}.jpg", picture)
    return Args(dataset="plankton", data_dir=str(folder), image_size=47, epochs=1, batch_size=16)


def test_math_plankton_as_kaggle_ships_it(tmp_path):
    args = make_plankton(tmp_path)
    train, test = cyclic.load_plankton(args, 47)
    assert train.x.shape == (32, 1, 47, 47) and len(test.y) == 4
    assert torch.bincount(torch.cat([train.y, test.y])).tolist() == [12, 12, 12]
    ink = train.x[0, 0].float()
    assert ink[0, 0] < 30 and ink.max() > 180  # the background is black, ink is white
    rows = (train.x.amax((1, 3)) > 100).sum(1)
    assert rows.min() > 5
    (cache,) = (tmp_path / "plankton").glob("*.npz")
    again, _ = cyclic.load_plankton(args, 47)
    assert torch.equal(again.x, train.x)
    cache.write_bytes(b"broken")
    with pytest.raises(SystemExit, match="delete it to make it again"):
        cyclic.load_plankton(args, 47)


def test_bad_input_plankton(tmp_path):
    args = make_plankton(tmp_path)
    (tmp_path / "plankton/train/class_1/3.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"3.jpg is damaged"):
        cyclic.load_plankton(args, 47)
    assert not list((tmp_path / "plankton").glob("*.npz"))
    (tmp_path / "plankton/train/empty").mkdir()
    with pytest.raises(SystemExit, match="empty holds 0 pictures"):
        cyclic.load_plankton(args, 47)
    with pytest.raises(SystemExit, match="datasciencebowl"):
        cyclic.load_plankton(dataclasses.replace(args, data_dir=str(tmp_path / "none")), 47)


def make_galaxies(folder, columns=38):
    generator = np.random.default_rng(0)
    lines = ["GalaxyID," + ",".join(f"Class{i}" for i in range(columns - 1))]
    for number in range(100, 120):
        pixels = generator.integers(0, 256, (424, 424, 3)).astype(np.uint8)
        save_picture(folder / f"galaxies/images_training_rev1/{number}.jpg", pixels)
        lines.append(f"{number}," + ",".join(f"{v:.4f}" for v in generator.random(columns - 1)))
    (folder / "galaxies/training_solutions_rev1.csv").write_text("\n".join(lines) + "\n")
    return Args(dataset="galaxies", data_dir=str(folder), image_size=32, epochs=1, batch_size=16)


def test_math_galaxies_as_kaggle_ships_them(tmp_path):
    train, test = cyclic.load_galaxies(make_galaxies(tmp_path), 32)
    assert train.x.shape == (18, 3, 48, 48) and test.y.shape == (2, 37)
    args = Args(dataset="galaxies", image_size=32)
    for training in (True, False):
        x = cyclic.prepare(train.x, args, training)
        assert x.shape == (18, 3, 32, 32) and (x == -1).float().mean() < 0.05  # no black corners
    assert train.y.min() >= 0 and train.y.max() <= 1


def test_bad_input_galaxies(tmp_path):
    args = make_galaxies(tmp_path, columns=37)
    with pytest.raises(SystemExit, match="37 columns, not 38"):
        cyclic.load_galaxies(args, 32)
    (tmp_path / "galaxies/training_solutions_rev1.csv").write_text("a,b\nx,y\n")
    with pytest.raises(SystemExit, match="is damaged"):
        cyclic.load_galaxies(args, 32)
    with pytest.raises(SystemExit, match="galaxy-zoo"):
        cyclic.load_galaxies(dataclasses.replace(args, data_dir="nowhere"), 32)


def make_buildings(folder):
    generator = np.random.default_rng(0)
    for part, name in (("train", "a"), ("train", "b"), ("test", "c")):
        picture = generator.integers(0, 256, (200, 160, 3)).astype(np.uint8)
        houses = np.zeros((200, 160), np.uint8)
        houses[40:90, 30:110] = 255
        picture[houses > 0] //= 4
        save_picture(folder / f"buildings/{part}/sat/{name}.tiff", picture)
        save_picture(folder / f"buildings/{part}/map/{name}.tif", houses)
    return Args(dataset="buildings", data_dir=str(folder), epochs=1, batch_size=8)


def test_math_buildings_as_published(tmp_path):
    train, test = cyclic.load_buildings(make_buildings(tmp_path), 80)
    assert train.x.shape == (2 * 4 * 3, 3, 80, 80) and test.y.shape == (12, 80, 80)
    middle = cyclic.centre(train.y, 40)
    assert set(middle.unique().tolist()) == {0, 1} and middle.shape == (24, 40, 40)
    assert torch.equal(middle[0] > 0, train.y[0, 20:60, 20:60] > 0)
    torch.manual_seed(0)
    x, y = cyclic.quarter_turns(train.x.float(), train.y)
    dark = x[0].mean(0) < 63
    assert (dark == (y[0] > 0)).float().mean() > 0.9  # picture and map turn alike
    (tmp_path / "buildings/train/map/a.tif").unlink()
    for cache in (tmp_path / "buildings").glob("*.npz"):
        cache.unlink()
    with pytest.raises(SystemExit, match="no map for a"):
        cyclic.load_buildings(make_args := Args(dataset="buildings", data_dir=str(tmp_path)), 80)
    with pytest.raises(SystemExit, match="vmnih"):
        cyclic.load_buildings(dataclasses.replace(make_args, data_dir="nowhere"), 80)


# ---- Scores and runs ----------------------------------------------------------------------------


def test_math_scores_are_scikit_learns():
    class Told(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x):
            return self.output[x[:, 0, 0, 0].mul(255).round().long()]

    x = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 2, 2).contiguous()
    output, answers = torch.randn(20, 37), torch.rand(20, 37)
    args = Args(dataset="galaxies", variant="baseline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cyclic, "prepare", lambda x, args, training: x.float() / 255)
        found = cyclic.evaluate(Told(output), args, cyclic.Pictures(x, answers))
        expected = root_mean_squared_error(answers.flatten(), output.sigmoid().flatten())
        assert found["eval/rmse"] == pytest.approx(expected, rel=1e-5)
        y = torch.randint(10, (20,))
        args = dataclasses.replace(args, dataset="digits")
        found = cyclic.evaluate(Told(output[:, :10]), args, cyclic.Pictures(x, y))
        wrong = 100 * (output[:, :10].argmax(1) != y).float().mean().item()
        assert found["eval/error"] == pytest.approx(wrong)
        maps = 255 * torch.randint(2, (20, 8, 8), dtype=torch.uint8)
        args = dataclasses.replace(args, dataset="buildings")
        scores = torch.randn(20, 1, 4, 4)
        found = cyclic.evaluate(Told(scores), args, cyclic.Pictures(x, maps))
        positive = scores[:, 0][maps[:, 2:6, 2:6] > 0]
        negative = scores[:, 0][maps[:, 2:6, 2:6] == 0]
        pairs = (positive[:, None] > negative[None]).double().mean().item()
        assert found["eval/auc"] == pytest.approx(pairs, abs=1e-6)


def test_math_learning_rate_drops_twice_near_the_end():
    args = Args(epochs=100, learning_rate=1.0)
    rates = [cyclic.learning_rate_at(epoch, args) for epoch in range(1, 101)]
    assert rates == pytest.approx([1.0] * 85 + [0.1] * 10 + [0.01] * 5)


def test_math_sliced_networks_get_a_quarter_of_new_pictures(tmp_path, monkeypatch):
    use(monkeypatch, small("digits"))
    seen = []
    update = cyclic.update
    monkeypatch.setattr(cyclic, "update", lambda *a: seen.append(len(a[2])) or update(*a))
    for variant, count in (("baseline", 128), ("pool", 32)):
        seen.clear()
        args = Args(**TINY | {"epochs": 1}, variant=variant, run_dir=str(tmp_path / variant))
        cyclic.main(args)
        assert seen[0] == count and sum(seen) == 1300


def without_times(metrics):
    return {k: v for k, v in metrics.items() if k not in ("charts/SPS", "charts/minutes")}


@pytest.mark.parametrize("variant", ["baseline", "roll-all"])
def test_learns_digits_and_goes_on_bit_for_bit(variant, tmp_path, monkeypatch):
    layout = small("digits")._replace(stages=((16,), (16, 16)), dense=(64, 64))
    use(monkeypatch, layout)
    epochs = 7 if variant == "baseline" else 3  # of a sliced network, with four times the steps
    args = Args(**TINY | {"epochs": epochs}, variant=variant, learning_rate=3e-3, batch_size=64)
    save, saved = cyclic.save_checkpoint, []

    def keep(path, **state):
        save(path, **state)
        saved.append(path.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cyclic, "save_checkpoint", keep)
        metrics = cyclic.main(dataclasses.replace(args, run_dir=str(tmp_path / "whole")))
    assert metrics["eval/error"] < 60  # 90 is chance
    for picture in ("paths.png", "answers.png"):
        assert (tmp_path / "whole" / picture).stat().st_size > 0
    (tmp_path / "half").mkdir()
    path = tmp_path / "half" / "checkpoint.pt"
    path.write_bytes(saved[0])
    on = cyclic.main(dataclasses.replace(args, resume=str(path)))
    assert without_times(on) == without_times(metrics)
    evaluated = cyclic.main(dataclasses.replace(args, evaluate=str(path)))
    assert evaluated == {tag: metrics[tag] for tag in evaluated} and len(evaluated) == 2


@pytest.mark.parametrize("make", [make_plankton, make_galaxies, make_buildings])
def test_learns_from_other_data_sets(make, tmp_path, monkeypatch):
    args = dataclasses.replace(make(tmp_path), variant="roll-all", run_dir=str(tmp_path / "run"))
    use(monkeypatch, small(args.dataset))
    metrics = cyclic.main(args)
    score = {"plankton": "eval/error", "galaxies": "eval/rmse", "buildings": "eval/auc"}
    assert np.isfinite(metrics[score[args.dataset]])
    assert (tmp_path / "run" / "answers.png").stat().st_size > 0


# ---- Mistakes of users --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"data_dir": "nowhere", "dataset": "rotated-mnist"}, "--dataset digits"),
        ({"variant": "roll-half"}, "is a network of --dataset buildings alone"),
        ({"variant": "roll-dense", "dataset": "buildings"}, "has no dense layer"),
        ({"image_size": 14}, "--image-size is for plankton"),
        ({"batch_size": 30}, "must be a multiple of 4"),
        ({"evaluate": "nothing.pt"}, "nothing.pt is missing"),
        ({"learning_rate": 1e9}, "loss is (nan|inf) in step"),
    ],
)
def test_bad_input(flags, sentence, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(cyclic.urllib.request, "urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=sentence):
        cyclic.main(Args(**{**TINY, **flags}))


def test_bad_input_sizes_and_other_variants(tmp_path, monkeypatch):
    args = make_plankton(tmp_path)
    with pytest.raises(SystemExit, match="at most 74 for galaxies"):
        cyclic.main(dataclasses.replace(args, dataset="galaxies", image_size=96))
    with pytest.raises(SystemExit, match="--image-size 16 makes maps of 16 pixels"):
        cyclic.main(dataclasses.replace(args, image_size=16))
    use(monkeypatch, small("digits"))
    args = Args(**TINY | {"epochs": 1}, run_dir=str(tmp_path / "run"))
    cyclic.main(args)
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(SystemExit, match="was made with variant=pool, not with variant=half"):
        cyclic.main(dataclasses.replace(args, variant="half", evaluate=checkpoint))
    with pytest.raises(SystemExit, match="raise --epochs"):
        cyclic.main(dataclasses.replace(args, resume=checkpoint, run_dir=""))


def test_command_line(tmp_path):
    flags = f"--dataset digits --variant half --epochs 1 --run-dir {tmp_path}"
    command = [sys.executable, str(ROOT / "cyclic_rotation_cnn.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "eval/error" in done.stdout and (tmp_path / "checkpoint.pt").exists()
