"""cyclic_rotation_cnn.py against the paper's identities, double loops, scikit-learn and its runs.

Public mistakes that these tests would catch: a roll that turns the wrong way (no test of invariance
sees it), a shift in the wrong direction, interleaved paths, pooling that breaks the symmetry,
independent statistics per path, an evaluation with dropout.
"""

import dataclasses
import itertools
import signal
import subprocess
import sys
from pathlib import Path

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
    Pictures,
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


@pytest.mark.parametrize("bfloat16", [False, True])
def test_math_bfloat16_computes_nearly_the_same(bfloat16):
    """Products in 16 bits, of parameters and for losses in 32."""
    torch.manual_seed(0)
    net = CyclicNetwork(small("digits"), "roll-all", 10, bfloat16=bfloat16).eval()
    kinds = {}
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda _, __, y, name=name: kinds.update({name: y.dtype}))
    x = torch.rand(4, 1, 28, 28)
    logits = net(x)
    logits.logsumexp(1).sum().backward()
    assert kinds[str(len(net) - 1)] == (torch.bfloat16 if bfloat16 else torch.float32)
    assert {p.grad.dtype for p in net.parameters()} == {logits.dtype} == {torch.float32}
    net.bfloat16 = False
    torch.testing.assert_close(logits, net(x), atol=0.05, rtol=0.05)


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


@pytest.mark.parametrize(
    "dataset, stages, width, stride",
    [
        ("rotated-mnist", (2, 2), 2, 2),
        ("plankton", (2, 2, 3, 3), 3, 2),
        ("galaxies", (2, 2, 3, 3), 2, 2),
    ],
)
def test_math_layer_tables_written_out(dataset, stages, width, stride):
    stage = ["Conv2d ReLU " * (count - 1) + "Conv2d MaxPool2d ReLU " for count in stages]
    maps = "".join(stage) + "Flatten "
    expected = {
        "baseline": maps + "Dropout Linear ReLU Dropout Linear ReLU Dropout Linear",
        "pool": f"CyclicSlice {maps}Dropout Linear ReLU Dropout Linear CyclicPool Dropout Linear",
        "roll-dense": f"CyclicSlice {maps}"
        "Dropout Linear ReLU CyclicRoll Dropout Linear CyclicPool Dropout Linear",
    }
    expected["half"] = expected["baseline"]
    for variant, kinds in expected.items():
        with torch.device("meta"):
            net = CyclicNetwork(layout_of(dataset), variant, 5)
        assert [type(layer).__name__ for layer in net] == kinds.split()
        assert {layer.p for layer in net if isinstance(layer, nn.Dropout)} == {0.5}
        pools = [layer for layer in net if isinstance(layer, nn.MaxPool2d)]
        assert {(p.kernel_size, p.stride, p.padding, p.ceil_mode) for p in pools} == {
            (width, stride, 0, False)
        }


def test_math_layer_table_of_buildings_written_out():
    for variant, first, last in (("baseline", "", "ReLU"), ("pool", "CyclicSlice ", "CyclicPool")):
        net = CyclicNetwork(layout_of("buildings"), variant, 1)
        kinds = first + "Conv2d ReLU " * 10 + f"Conv2d {last} Conv2d"
        assert [type(layer).__name__ for layer in net] == kinds.split()


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
    (tmp_path / "plankton/train_47.part").mkdir()  # nothing can be written there
    with pytest.raises(SystemExit, match=r"train_47.npz cannot be written .*change --data-dir"):
        cyclic.load_plankton(args, 47)
    (tmp_path / "plankton/train_47.part").rmdir()
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


@pytest.mark.parametrize("part, shape", [("map", (200, 150)), ("sat", (70, 160, 3))])
def test_bad_input_buildings_of_other_sizes(part, shape, tmp_path):
    args = make_buildings(tmp_path)
    (path,) = (tmp_path / "buildings/test" / part).glob("c.*")
    save_picture(path, np.zeros(shape, np.uint8))
    if part == "sat":  # picture and map agree, and both are smaller than a tile
        save_picture(tmp_path / "buildings/test/map/c.tif", np.zeros(shape[:2], np.uint8))
    with pytest.raises(SystemExit, match=r"c.tiff and .*c.tif must be of one size and at least 80"):
        cyclic.load_buildings(args, 80)


@pytest.mark.parametrize(
    "dataset, count, tests", [("rotated-mnist", 12_000, 50_000), ("digits", 1300, 497)]
)
def test_math_rotated_digits_train_upright_and_test_turned(dataset, count, tests, monkeypatch):
    """Squares whose brightness is told by their label: each has a label of its own."""

    def load(first, N):
        y = torch.arange(first, first + N)
        return (y % 200 + 50).byte().view(-1, 1, 1).expand(-1, 4, 4), y

    sizes = (60_000, 10_000) if dataset == "rotated-mnist" else (1500, 297)
    parts = {"train": load(0, sizes[0]), "t10k": load(sizes[0], sizes[1])}
    monkeypatch.setattr(cyclic, "load_digits", parts.get)
    monkeypatch.setattr(cyclic, "load_mnist", lambda folder, split: parts[split])
    train, test = cyclic.load_rotated(Args(dataset=dataset))
    assert len(train.x) == len(train.y) == count and len(test.x) == len(test.y) == tests
    assert len(torch.cat([train.y, test.y]).unique()) == count + tests
    for part in (train, test):
        assert (part.x[:, 0, 1:3, 1:3] == (part.y % 200 + 50).view(-1, 1, 1)).all()
    corners = [part.x[:, 0, 0, 0].float() / (part.y % 200 + 50) for part in (train, test)]
    assert (corners[0] == 1).all() and corners[1].mean() < 0.9
    torch.manual_seed(7)
    assert torch.equal(cyclic.load_rotated(Args(dataset=dataset))[1].x, test.x)


def points(args, S, seed, training=True):
    """Where three spots of a picture come to lie in 500 training inputs: [3, 500, 2], x first."""
    means = []
    for row, column in ((0, 0), (0, 12), (12, 0)):
        x = torch.zeros(500, layout_of(args.dataset).channels, S, S, dtype=torch.uint8)
        middle = S // 2
        x[..., middle + row - 2 : middle + row + 3, middle + column - 2 : middle + column + 3] = 255
        torch.manual_seed(seed)
        out = cyclic.prepare(x, args, training)[:, 0]
        out = out - out.min()
        p = torch.arange(out.shape[-1]) - (out.shape[-1] - 1) / 2
        mass = out.sum((1, 2))
        means.append(
            torch.stack([(out.sum(1) * p).sum(1) / mass, (out.sum(2) * p).sum(1) / mass], 1)
        )
    return torch.stack(means)


def mirrored(spots):
    right, below = spots[1] - spots[0], spots[2] - spots[0]
    return right[:, 0] * below[:, 1] - right[:, 1] * below[:, 0] < 0


@pytest.mark.parametrize("dataset, flips", [("digits", False), ("galaxies", True)])
def test_math_digits_are_turned_and_galaxies_also_flipped(dataset, flips):
    spots = points(Args(dataset=dataset, image_size=0), 61 if not flips else 96, 0)
    right = spots[1] - spots[0]
    assert (right.norm(dim=1) - 12).abs().max() < 0.5
    assert torch.histc(torch.atan2(right[:, 1], right[:, 0]), 4, -np.pi, np.pi).min() > 80
    assert 200 < mirrored(spots).sum() < 300 if flips else not mirrored(spots).any()


def test_math_plankton_is_varied_as_the_header_says():
    """From where three spots go: the matrix from the output to the picture, and its shift."""
    S = 95
    spots = points(Args(dataset="plankton"), S, 0)
    places = torch.stack([spots[1] - spots[0], spots[2] - spots[0]], 2)  # [500, 2, 2]
    matrix = 12 * torch.linalg.inv(places)
    factors = matrix.norm(dim=1)  # of the width and of the height
    for factor in factors.unbind(1):
        assert 1.27 < factor.max() < 1.33 and 1 / 1.33 < factor.min() < 1 / 1.27
        assert abs(factor.log().mean()) < 0.03
    assert abs(torch.corrcoef(factors.T)[0, 1]) < 0.2
    cosines = (matrix[:, :, 0] * matrix[:, :, 1]).sum(1) / factors.prod(1)
    slant = torch.asin(cosines).rad2deg()
    assert 14 < slant.abs().max() < 16.5 and abs(slant.mean()) < 2
    shift = (matrix @ spots[0][:, :, None])[:, :, 0]
    assert 0.036 * S < shift.abs().max() < 0.044 * S
    assert 200 < mirrored(spots).sum() < 300


@pytest.mark.parametrize("dataset, S", [("digits", 28), ("plankton", 95), ("galaxies", 96)])
def test_math_inputs_are_varied_in_training_alone(dataset, S):
    args, C = Args(dataset=dataset), layout_of(dataset).channels
    x = torch.randint(0, 256, (3, C, S, S), dtype=torch.uint8)
    expected = x[..., 16:80, 16:80] / 127.5 - 1 if dataset == "galaxies" else x / 255
    torch.testing.assert_close(cyclic.prepare(x, args, False), expected)
    varied = [cyclic.prepare(x, args, True) for _ in range(2)]
    assert not torch.equal(varied[0], varied[1]) and varied[0].shape == expected.shape
    outside = -1 if dataset == "galaxies" else 0
    assert cyclic.prepare(0 * x, args, True).unique().tolist() == [outside]


def test_math_tiles_are_scaled_to_both_sides_of_zero():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for training in (True, False):
        out = cyclic.prepare(x, Args(dataset="buildings"), training)
        torch.testing.assert_close(out, x / 127.5 - 1)


def test_math_tiles_and_maps_turn_and_flip_alike():
    y = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8)
    kinds = set()
    torch.manual_seed(0)
    for _ in range(60):
        x_t, y_t = cyclic.quarter_turns(y[:, None].float(), y)
        assert torch.equal(x_t[:, 0], y_t.float())
        kinds.add(tuple(y_t.flatten().tolist()))
    symmetries = [r(z, k) for z in (y, y.flip(-1)) for k in range(4)]
    assert kinds == {tuple(z.flatten().tolist()) for z in symmetries}


def test_math_plankton_holds_out_a_tenth_of_each_class(tmp_path):
    train, test = cyclic.load_plankton(make_plankton(tmp_path, each=20), 47)
    assert torch.bincount(train.y).tolist() == [18] * 3
    assert torch.bincount(test.y).tolist() == [2] * 3


def test_math_plankton_keeps_its_proportions_and_the_middle(tmp_path):
    for c, shape in enumerate(((40, 20), (30, 90))):
        for i in range(10):
            picture = np.full(shape, 55 + c, np.uint8)
            save_picture(tmp_path / f"plankton/train/class_{c}/{i}.jpg", picture)
    train, _ = cyclic.load_plankton(Args(dataset="plankton", data_dir=str(tmp_path)), 48)
    expected = [torch.zeros(48, 48), torch.zeros(48, 48)]
    expected[0][:, 12:36], expected[1][16:32] = 200, 199
    for x, y in zip(train.x, train.y):
        assert (x[0] - expected[y]).abs().max() <= 1


def test_math_galaxies_find_their_answers_by_number(tmp_path):
    lines = ["GalaxyID," + ",".join(f"Class{i}" for i in range(37))]
    for i, number in enumerate((900, 100008, 77, 2000, 15, 100001, 31, 8, 450, 62)):
        save_picture(
            tmp_path / f"galaxies/images_training_rev1/{number}.jpg",
            np.full((106, 106, 3), 25 * i, np.uint8),
        )
        lines.append(f"{number}," + ",".join([str(i / 10)] * 36 + ["1"]))
    (tmp_path / "galaxies/training_solutions_rev1.csv").write_text("\n".join(lines) + "\n")
    for part in cyclic.load_galaxies(Args(dataset="galaxies", data_dir=str(tmp_path)), 64):
        assert (part.x.float().mean((1, 2, 3)) - 250 * part.y[:, 0]).abs().max() < 3
        assert (part.y[:, -1] == 1).all() and (part.y[:, 0] == part.y[:, 35]).all()


def test_math_houses_are_red_in_the_published_maps(tmp_path):
    args = make_buildings(tmp_path)
    grey = cyclic.load_buildings(args, 80)
    for cache in (tmp_path / "buildings").glob("*.npz"):
        cache.unlink()
    for part, name in (("train", "a"), ("train", "b"), ("test", "c")):
        houses = np.zeros((200, 160, 3), np.uint8)
        houses[40:90, 30:110, 0] = 255
        save_picture(tmp_path / f"buildings/{part}/map/{name}.tif", houses)
    red = cyclic.load_buildings(args, 80)
    for part in range(2):
        assert torch.equal(red[part].y, grey[part].y) and red[part].y.max() == 255
    assert cyclic.centre(red[1].y, 40).sum() == 50 * 80  # every house in one labelled middle


@pytest.mark.parametrize(
    "make, sizes, widths",
    [
        (make_plankton, (47, 23), (47, 23)),
        (make_galaxies, (32, 16), (48, 24)),
        (make_buildings, (80, 60), (80, 60)),
    ],
)
def test_math_caches_are_of_one_size(make, sizes, widths, tmp_path):
    args = make(tmp_path)
    load = getattr(cyclic, f"load_{args.dataset}")
    for size, width in zip(sizes, widths):
        for part in load(args, size):
            assert part.x.shape[2:] == (width, width)


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
    for picture in ("paths.png", "answers.png"):
        path.with_name(picture).unlink()
    evaluated = cyclic.main(dataclasses.replace(args, evaluate=str(path)))
    assert evaluated == {tag: metrics[tag] for tag in evaluated} and len(evaluated) == 2
    for picture in ("paths.png", "answers.png"):
        assert path.with_name(picture).stat().st_size > 0


@pytest.mark.parametrize("make", [make_plankton, make_galaxies, make_buildings])
def test_learns_from_other_data_sets(make, tmp_path, monkeypatch):
    args = dataclasses.replace(make(tmp_path), variant="roll-all", run_dir=str(tmp_path / "run"))
    use(monkeypatch, small(args.dataset))
    metrics = cyclic.main(args)
    score = {"plankton": "eval/error", "galaxies": "eval/rmse", "buildings": "eval/auc"}
    assert np.isfinite(metrics[score[args.dataset]])
    assert (tmp_path / "run" / "answers.png").stat().st_size > 0


class Seen:
    """What main gives to update and the drawings, which this takes the place of."""

    def __init__(self, monkeypatch):
        self.steps, self.drawn = [], []
        monkeypatch.setattr(cyclic, "update", self.update)
        for draw in ("draw_paths", "draw_answers"):
            monkeypatch.setattr(cyclic, draw, lambda *given: self.drawn.append(given[2]))

    def update(self, net, optimizer, x, y, dataset):
        (group,) = optimizer.param_groups
        assert net.training and dataset and len(group["params"]) == len(list(net.parameters()))
        self.net = net
        self.steps.append((group["lr"], group["weight_decay"], x.clone(), y.clone()))
        return torch.zeros(())


LOADERS = {"plankton": "load_plankton", "galaxies": "load_galaxies", "buildings": "load_buildings"}


def few(dataset, N=16):
    layout = layout_of(dataset)
    S = 96 if dataset == "galaxies" else layout.size
    x = torch.zeros(N, layout.channels, S, S, dtype=torch.uint8)
    x[..., : S // 2, : 3 * S // 4] = 255
    y = {"galaxies": torch.rand(N, 37), "buildings": x[:, 0]}.get(dataset, torch.arange(N))
    return Pictures(x, y)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs main on few pictures with a small network; returns what it saw."""

    def run(dataset, N=16, **flags):
        seen = Seen(monkeypatch)
        layout = small(dataset)
        use(monkeypatch, layout._replace(outputs=N) if layout.outputs == 10 else layout)
        examples = few(dataset, N), few(dataset, N // 2)
        monkeypatch.setattr(cyclic, LOADERS.get(dataset, "load_rotated"), lambda *_: examples)
        name = f"{dataset}{len(list(tmp_path.iterdir()))}"
        flags = {"epochs": 1, "batch_size": 8, "variant": "baseline"} | flags
        seen.metrics = cyclic.main(Args(dataset=dataset, run_dir=str(tmp_path / name), **flags))
        return seen

    return run


def test_math_buildings_are_learned_from_the_middles_of_their_maps():
    maps = 255 * torch.randint(2, (5, 8, 8), dtype=torch.uint8)
    output = torch.randn(5, 1, 4, 4)
    p = output[:, 0].sigmoid()
    houses = maps[:, 2:6, 2:6] > 0
    expected = -torch.where(houses, p.log(), (1 - p).log()).mean()
    torch.testing.assert_close(cyclic.objective(output, maps, "buildings"), expected)
    answers = torch.rand(5, 37)
    expected = (output.view(5, 16)[:, :1].sigmoid() - answers).square().mean()
    found = cyclic.objective(output.view(5, 16)[:, :1].expand(5, 37), answers, "galaxies")
    torch.testing.assert_close(found, expected)


def test_math_weights_begin_as_he_et_al_advise_and_the_digits_network_is_ours():
    torch.manual_seed(0)
    net = CyclicNetwork(layout_of("digits"), "baseline", 10)
    layers = [layer for layer in net if isinstance(layer, (nn.Conv2d, nn.Linear))]
    shapes = [tuple(layer.weight.shape[:2]) for layer in layers]
    assert shapes == [(32, 1), (32, 32), (64, 32), (64, 64), (256, 64 * 49), (256, 256), (10, 256)]
    for layer in layers[1:-1]:
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        assert not layer.bias.any()


def test_math_reports_are_means_and_evaluations_come_when_due(run, monkeypatch):
    losses, evaluated, evaluate, update = [], [], cyclic.evaluate, Seen.update

    def counting(*how):
        losses.append(len(losses) + 1.0)
        return update(*how) + losses[-1]

    monkeypatch.setattr(Seen, "update", counting)
    monkeypatch.setattr(cyclic, "evaluate", lambda *a: evaluated.append(losses[-1]) or evaluate(*a))
    seen = run("digits", N=16, epochs=5, eval_every=2, batch_size=8)
    assert evaluated == [4, 8, 10]  # updates: after 2, 4 and 5 epochs
    assert len(seen.steps) == 10 and seen.metrics["losses/loss"] == (9 + 10) / 2


@pytest.mark.parametrize("dataset", ["digits", "plankton", "galaxies", "buildings"])
def test_math_weight_decay_is_for_plankton_alone(dataset, run, monkeypatch):
    monkeypatch.setattr(cyclic, "check_flags", lambda _: None)  # which refuses it on others
    seen = run(dataset, N=8, weight_decay=0.5)
    assert {step[1] for step in seen.steps} == {0.5 if dataset == "plankton" else 0.0}


def test_math_the_optimizer_steps_with_the_rate_of_its_epoch(run):
    seen = run("digits", N=8, epochs=20, learning_rate=1.0, eval_every=20)
    assert [step[0] for step in seen.steps] == pytest.approx([1.0] * 17 + [0.1] * 2 + [0.01])
    assert seen.metrics["charts/learning_rate"] == pytest.approx(0.01)


def test_math_every_epoch_has_all_pictures_in_a_new_order(run):
    orders = torch.cat([step[3] for step in run("digits", epochs=3).steps]).view(3, 16)
    assert (orders.sort().values == torch.arange(16)).all()
    assert len(orders.unique(dim=0)) == 3 and not (orders == torch.arange(16)).all(1).any()


def test_math_training_turns_tiles_with_their_maps(run):
    steps, kinds = run("buildings", N=64, batch_size=4).steps, set()
    for _, _, x, y in steps:
        assert torch.equal(x[:, 0] > 0, y > 0)
        kinds.add(tuple(map(tuple, y[0].nonzero()[[0, -1]].tolist())))
    assert len(steps) == 16 and len(kinds) >= 5


@pytest.mark.parametrize("dataset", ["digits", "plankton"])
def test_math_training_varies_its_pictures(dataset, run):
    x = run(dataset, N=8).steps[0][2]
    assert all(not torch.equal(picture, x[0]) for picture in x[1:])


def test_math_flags_reach_the_network(run):
    kinds = {}
    for turned, bfloat16 in (("filters", False), ("maps", True)):
        flags = {"variant": "roll-all", "pool": "max", "turned": turned, "bfloat16": bfloat16}
        net = run("digits", N=8, **flags).net
        assert net.in_16_bits == bfloat16
        kinds[turned] = {type(layer).__name__ for layer in net}
        assert next(layer for layer in net if isinstance(layer, cyclic.CyclicPool)).how == "max"
    assert "TurnedConv2d" in kinds["filters"] and "TurnedConv2d" not in kinds["maps"]
    first, second = (run("digits", N=8, seed=seed).net[0].weight for seed in (1, 2))
    assert not torch.equal(first, second)


def test_math_minutes_go_on_where_they_stopped(run, tmp_path):
    run("digits", N=8)
    (path,) = tmp_path.glob("*/checkpoint.pt")
    checkpoint = torch.load(path)
    torch.save(checkpoint | {"seconds": 6000.0}, path)
    seen = run("digits", N=8, epochs=2)
    assert seen.metrics["charts/minutes"] < 10
    args = Args(dataset="digits", epochs=2, batch_size=8, variant="baseline", resume=str(path))
    assert 100 < cyclic.main(args)["charts/minutes"] < 110
    assert torch.load(path)["seconds"] > 6000


def test_math_an_update_is_a_step_down_its_own_gradient():
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        x, y, theta = torch.randn(5, 3), torch.randint(4, (5,)), net.weight.detach().clone()
        loss = nn.functional.cross_entropy(net(x), y)
        (gradient,) = torch.autograd.grad(loss, net.weight)
        found = cyclic.update(net, optimizer, x, y, "digits")
        torch.testing.assert_close(net.weight.detach(), theta - 0.5 * gradient)
        assert found == loss.detach() and not found.requires_grad


# ---- Drawings -----------------------------------------------------------------------------------


def drawn(draw, *arguments):
    """The figure that a function closes."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cyclic.plt, "close", kept.append)
        draw(*arguments)
    cyclic.plt.close(kept[0])
    return kept[0]


def test_math_pictures_of_the_test_set_are_drawn(run):
    assert [len(examples.y) for examples in run("digits", N=8).drawn] == [4, 4]


def test_math_drawn_paths_change_places_with_the_picture(tmp_path):
    torch.manual_seed(0)
    for variant in ("pool", "roll-all"):
        net, args = CyclicNetwork(small("digits"), variant, 10), Args(dataset="digits")
        examples = Pictures(torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8), None)
        axes = drawn(cyclic.draw_paths, net, args, examples, tmp_path / "paths.png").axes
        rows = [
            [torch.tensor(np.array(axis.images[0].get_array())) for axis in axes[5 * k : 5 * k + 5]]
            for k in range(4)
        ]
        x = examples.x / 255
        everywhere = [net[1](r(x, k)).relu()[0].sum((1, 2)) for k in range(4)]
        strongest = torch.stack(everywhere).sum(0).argmax()
        for k in range(4):
            torch.testing.assert_close(rows[k][0], r(x, k)[0, 0])
            for i in range(4):
                maps = net[1](r(x, k + i)).relu()[0, strongest].detach()
                torch.testing.assert_close(rows[k][i + 1], maps)
        assert axes[5].get_ylabel() == "90 degrees" and axes[2].get_title() == "path 1"


def test_math_drawn_answers_of_digits_and_galaxies(tmp_path):
    y, said = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([1, 0, 1, 1, 1, 2])
    output = nn.functional.one_hot(said, 3).float()
    x = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    args = Args(dataset="digits")
    answers = torch.rand(6, 37)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cyclic, "predict", lambda *_: output)
        figure = drawn(cyclic.draw_answers, None, args, Pictures(x, y), tmp_path / "a.png")
        patch.setattr(cyclic, "predict", lambda *_: answers.logit())
        args = dataclasses.replace(args, dataset="galaxies")
        scatter = drawn(cyclic.draw_answers, None, args, Pictures(x, answers), tmp_path / "a.png")
    shares, first, second = (axis.images[0].get_array() for axis in figure.axes)
    assert shares.tolist() == [[0.25, 0.75, 0], [0, 1, 0], [0, 0, 1]]
    assert figure.axes[0].get_ylabel() == "true"
    assert (first == x[0, 0].numpy()).all() and (second == x[2, 0].numpy()).all()
    assert figure.axes[1].get_title() == "0 taken for 1"
    for i, axis in enumerate(scatter.axes):
        (line,) = axis.lines
        np.testing.assert_allclose(line.get_xdata(), answers[:, i])
        np.testing.assert_allclose(line.get_ydata(), answers[:, i], rtol=1e-4)


# ---- Mistakes of users --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"data_dir": "nowhere", "dataset": "rotated-mnist"}, "--dataset digits"),
        ({"variant": "roll-half"}, "is a network of --dataset buildings alone"),
        ({"variant": "roll-dense", "dataset": "buildings"}, "has no dense layer"),
        ({"image_size": 14}, "--image-size is for plankton"),
        ({"image_size": 40, "dataset": "buildings"}, "even and above 40 for buildings, not 40"),
        ({"variant": "half", "pool": "max"}, "--pool has no effect with --variant half"),
        ({"variant": "pool", "turned": "maps"}, "--turned has no effect with --variant pool"),
        ({"weight_decay": 0.5}, "--weight-decay has no effect on digits: leave it out"),
        ({"batch_size": 30}, "must be a multiple of 4, for the four paths, not 30"),
        ({"evaluate": "nothing.pt"}, "nothing.pt is missing"),
        (
            {"run_dir": "used", "data_dir": "nowhere", "dataset": "rotated-mnist"},
            "used holds a run already",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(cyclic.urllib.request, "urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    Path("used").mkdir()
    Path("used/checkpoint.pt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"(?s){sentence}") as stop:
        cyclic.main(Args(**{**TINY, **flags}))
    assert isinstance(stop.value.code, str)  # so the exit code is 1
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(cyclic.Diverged, match=r"loss is (nan|inf) in step \d+ of epoch 1"):
        cyclic.main(Args(**TINY, learning_rate=1e9, run_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("at", "epochs", "sentence"),
    [
        ("load_rotated", 2, r"^Stopped\.$"),
        ("update", 2, r"^Stopped before the first checkpoint\.$"),
        ("report", 2, r"^Stopped; go on with the same flags and --resume .*checkpoint\.pt$"),
        ("report", 1, r"^Stopped; evaluate with --evaluate .*checkpoint\.pt$"),
        ("evaluate", 1, r"^Stopped; evaluate with --evaluate .*checkpoint\.pt$"),
    ],
)
def test_bad_input_a_signal_ends_a_run_in_one_sentence(at, epochs, sentence, tmp_path, monkeypatch):
    use(monkeypatch, small("digits"))
    monkeypatch.setattr(cyclic, "load_rotated", lambda _: (few("digits", 10),) * 2)
    monkeypatch.setattr(cyclic, at, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match=sentence):
        cyclic.main(Args(**TINY | {"epochs": epochs}, run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run").exists() == (at != "load_rotated")


def test_math_the_drawn_aerial_picture_is_the_part_that_is_labelled(tmp_path, monkeypatch):
    use(monkeypatch, small("buildings"))
    net, args = CyclicNetwork(layout_of("buildings"), "baseline", 1), Args(dataset="buildings")
    figure = drawn(cyclic.draw_answers, net, args, few("buildings", 1), tmp_path / "answers.png")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["aerial picture", "predicted", "label"]
    shapes = {axis.images[0].get_array().shape[:2] for axis in figure.axes}
    assert len(shapes) == 1
    photo, label = (figure.axes[i].images[0].get_array() for i in (0, 2))
    assert np.array_equal(np.asarray(photo)[..., 0] > 0, np.asarray(label) > 0)  # they are alike


def test_bad_input_sizes_and_other_variants(tmp_path, monkeypatch):
    args = make_plankton(tmp_path)
    with pytest.raises(SystemExit, match="at most 64 for galaxies"):
        cyclic.main(dataclasses.replace(args, dataset="galaxies", image_size=96))
    with pytest.raises(SystemExit, match="--image-size 16 makes maps of 16 pixels"):
        cyclic.main(dataclasses.replace(args, image_size=16))
    use(monkeypatch, small("digits"))
    args = Args(**TINY | {"epochs": 1}, run_dir=str(tmp_path / "run"))
    cyclic.main(args)
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(SystemExit, match="was made with --pool mean, not with --pool max"):
        cyclic.main(dataclasses.replace(args, pool="max", evaluate=checkpoint))
    with pytest.raises(SystemExit, match="was made with --variant pool, not with --variant half"):
        cyclic.main(dataclasses.replace(args, variant="half", evaluate=checkpoint))
    monkeypatch.setattr(cyclic, "load_rotated", lambda _: (few("digits", 10),) * 2)
    with pytest.raises(SystemExit, match="was made with --dataset digits, not with --dataset rot"):
        cyclic.main(dataclasses.replace(args, dataset="rotated-mnist", evaluate=checkpoint))
    changes = {"seed": 2, "batch_size": 64, "learning_rate": 0.5, "weight_decay": 0.5}
    changes["bfloat16"] = True
    assert changes.keys() == set(cyclic.KEPT)
    monkeypatch.setattr(cyclic, "check_flags", lambda _: None)  # weight_decay is for plankton
    for name, value in changes.items():
        with pytest.raises(SystemExit, match=f"was made with --{name.replace('_', '-')} "):
            cyclic.main(dataclasses.replace(args, **{name: value}, resume=checkpoint))
    torch.save(torch.load(checkpoint) | {"epoch": 3}, checkpoint)
    with pytest.raises(SystemExit, match="has had 3 epochs: raise --epochs"):
        cyclic.main(dataclasses.replace(args, resume=checkpoint, run_dir=""))


def test_command_line(tmp_path):
    flags = f"--dataset digits --variant half --epochs 1 --run-dir {tmp_path}"
    command = [sys.executable, str(ROOT / "cyclic_rotation_cnn.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "eval/error" in done.stdout and (tmp_path / "checkpoint.pt").exists()
