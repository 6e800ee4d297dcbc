"""The incremental programs against their reference, which reads them site by site."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import close, opcheck
from incremental_cases import CASES, MaskedConv2d, build
from torch import Tensor, nn

from pygen import _native, ops
from pygen.autoregressive.incremental import Incremental, incremental
from pygen.ops.incremental_program import Program

# Programs with every kind of operation, that the fibers run through in seconds.
SMALL = ("gated, colours", "mixed", "snail", "wave, embedding", "class planes", "plus plus, grey")


@functools.cache
def program(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Incremental:
    case = build(name, dtype)
    options = dict(case.options)
    if "condition" in options:
        options["condition"] = options["condition"].to(device)
    return incremental(case.model.to(device), case.shape, levels=case.levels, verify=False, **options)


def tiny(shape: tuple[int, ...], outputs: int, device: torch.device, dtype: torch.dtype, **options: Any) -> Incremental:
    """A network of two layers with as many outputs as asked for."""
    torch.manual_seed(outputs)
    model = nn.Sequential(MaskedConv2d("A", shape[0], 4, 3, padding=1), nn.Conv2d(4, outputs, 1)).to(device, dtype)
    return incremental(model, shape, verify=False, **options)


def arguments(net: Incremental, n: int, **changes: Any) -> dict[str, Any]:
    """Of `incremental_advance`, with its own state and tokens."""
    device = net.device
    torch.manual_seed(n)
    ids = torch.arange(n, device=device) + 3
    own = {
        "state": torch.full((n, net.program.state), torch.nan, dtype=net.dtype, device=device),
        "tokens": torch.randint(net.levels, (n, net.length), device=device),
        "weights": net.weights,
        "program": net.program,
        "conditions": torch.randn(n, net.program.conditions, dtype=net.dtype, device=device),
        "values": net.values.to(net.dtype),
        "sample_ids": ids, "seed": 5, "begin": 0, "end": net.length, "logistics": net.logistics,
    }  # fmt: skip
    return own | changes


def both(net: Incremental, n: int, **changes: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tokens, log-probabilities and logits of the kernel and of the reference."""
    found = []
    for function in (ops.incremental_advance, ops.incremental_advance_reference):
        own = arguments(net, n, **changes)
        found.append((own["tokens"], *function(**own)))
    return found[0], found[1]


def check(net: Incremental, n: int) -> None:
    """The kernel against the reference."""
    for mode in ("follow", "score", "draw"):
        (tokens, log_prob, logits), expected = both(net, n, mode=mode, with_logits=True)
        assert torch.equal(tokens, expected[0])
        close(logits, expected[2], scale=30)
        close(log_prob, expected[1], scale=30)
        assert (log_prob == 0).all() == (mode == "follow")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SMALL)
def test_equals_the_reference(backend, device, name, dtype):
    check(program(name, dtype, str(device)), 2)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(SMALL)))
def test_every_network_s_program_equals_the_reference(name):
    found, expected = both(program(name), 3, mode="draw", with_logits=True)
    assert torch.equal(found[0], expected[0])
    close(found[2], expected[2], scale=30)


def test_tokens_are_those_of_the_sampler(backend, device):
    net = program("gated", device=str(device))
    for options in ({}, {"temperature": 0.6}, {"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.7},
                    {"temperature": 0.0}, {"top_p": 0.5, "ties": "transformers"}):  # fmt: skip
        own = arguments(net, 3, mode="draw", with_logits=True, **options)
        log_prob, logits = ops.incremental_advance(**own)
        for t in range(0, net.length, 5):
            token, chance = ops.sample_logits(
                logits[:, t], seed=5, sample_ids=own["sample_ids"], position=t, **options
            )  # fmt: skip
            assert torch.equal(own["tokens"][:, t], token), options
            assert torch.equal(log_prob[:, t], chance)


def test_levels_are_those_of_the_mixture_s_sampler(backend, device):
    net = program("plus plus, grey", device=str(device))
    own = arguments(net, 3, mode="draw", with_logits=True)
    log_prob, parameters = ops.incremental_advance(**own)
    x, chance = ops.sample_discretized_logistics(
        parameters[:, 7].contiguous(), seed=5, sample_ids=own["sample_ids"], position=7, colours=1, levels=net.levels
    )
    assert torch.equal(net.values[own["tokens"][:, 7]], x[:, 0])
    torch.testing.assert_close(log_prob[:, 7], chance[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mixtures", "colours"), [(17, 3), (128, 3), (128, 1)])
def test_mixtures_of_many_components(backend, device, mixtures, colours, dtype):
    outputs = mixtures * (10 if colours == 3 else 3)
    check(tiny((colours, 2, 3), outputs, device, dtype, levels=16, logistics=True), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [8192, 16384])
def test_many_outputs(backend, device, levels, dtype):
    check(tiny((1, 1, 3), levels, device, dtype, levels=levels), 2)


@pytest.mark.parametrize("name", ["gated, colours", "snail"])
def test_a_row_does_not_depend_on_its_batch(backend, device, name):
    net = program(name, device=str(device))
    n = 130 if backend == "cuda" else 5 if backend == "simt" else 21
    whole = arguments(net, n, mode="draw", with_logits=True)
    conditions, given = whole["conditions"], whole["tokens"].clone()
    expected = ops.incremental_advance(**whole)
    for rows in (torch.arange(n).flip(0), torch.tensor([n - 1]), torch.tensor([2, 0])):
        rows = rows.to(device)
        part = arguments(
            net, len(rows), mode="draw", with_logits=True, conditions=conditions[rows].contiguous(),
            tokens=given[rows].contiguous(), sample_ids=whole["sample_ids"][rows],
        )  # fmt: skip
        for found, own in zip(ops.incremental_advance(**part), expected, strict=True):
            assert torch.equal(found, own[rows])
        assert torch.equal(part["tokens"], whole["tokens"][rows])


def test_several_samples_share_a_block(backend, device):
    """More samples than keep every multiprocessor busy: the result is that of each alone."""
    net = program("upsampled", device=str(device))
    n = 131
    own = arguments(net, n, mode="follow", with_logits=True, begin=0, end=3)
    logits = ops.incremental_advance(**own)[1]
    alone = arguments(net, 1, mode="follow", with_logits=True, begin=0, end=3, tokens=own["tokens"][130:].clone())
    assert torch.equal(ops.incremental_advance(**alone)[1], logits[130:])


@pytest.mark.usefixtures("four_threads")
def test_threads_do_not_change_a_bit(backend, device):
    if backend != "cpu":
        pytest.skip("one grid, however many threads")
    net = program("plus plus", device=str(device))
    results = []
    for threads in (1, 2, 3):
        _native.set_num_threads(threads)
        results.append(ops.incremental_advance(**arguments(net, 11, mode="draw", with_logits=True)))
    _native.set_num_threads(0)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_steps_in_parts_and_again_are_the_same(backend, device):
    net = program("gated, colours", device=str(device))
    whole = arguments(net, 2, mode="draw")
    expected, _ = ops.incremental_advance(**whole)
    own = arguments(net, 2, mode="draw")
    for begin, end in ((0, 7), (6, 7), (7, 7), (7, 30), (29, 90)):
        found, _ = ops.incremental_advance(**own | {"begin": begin, "end": end})
        assert torch.equal(found, expected[:, begin:end])
    assert torch.equal(own["tokens"], whole["tokens"])


def test_following_tokens_draws_nothing(backend, device):
    net = program("gated", device=str(device))
    own = arguments(net, 2, mode="follow")
    before = own["tokens"].clone()
    # Memory that was something else before.
    torch.full((2, net.length), 3.0, device=device)
    log_prob, logits = ops.incremental_advance(**own)
    assert torch.equal(log_prob, torch.zeros_like(log_prob))
    assert torch.equal(own["tokens"], before)
    assert logits.shape == (2, 0, 5)


def test_known_tokens_stay(backend, device):
    net = program("gated", device=str(device))
    drawn = arguments(net, 2, mode="draw")
    ops.incremental_advance(**drawn)
    known = torch.rand(2, net.length, device=device) < 0.5
    tokens = torch.where(known, drawn["tokens"], 0)
    log_prob, _ = ops.incremental_advance(**arguments(net, 2, mode="draw", known=known, tokens=tokens))
    assert torch.equal(tokens, drawn["tokens"])
    assert (log_prob[known] == 0).all()
    assert (log_prob[~known] < 0).all()


def test_nan_stays_in_its_row(backend, device):
    net = program("gated, classes", device=str(device))
    conditions = torch.zeros(3, net.program.conditions, device=device)
    clean = arguments(net, 3, mode="draw", conditions=conditions)
    ops.incremental_advance(**clean)
    broken = conditions.clone()
    broken[1] = torch.nan
    own = arguments(net, 3, mode="draw", conditions=broken)
    log_prob, _ = ops.incremental_advance(**own)
    assert (own["tokens"][1] == -1).all()
    assert log_prob[1].isnan().all()
    assert torch.equal(own["tokens"][[0, 2]], clean["tokens"][[0, 2]])
    scored = arguments(net, 3, mode="score", conditions=conditions, tokens=clean["tokens"].clone())
    scored["tokens"][2, 4] = -1
    log_prob, _ = ops.incremental_advance(**scored)
    assert log_prob[2, 4:6].isnan().all()
    assert not log_prob[2, :4].isnan().any()
    assert not log_prob[:2].isnan().any()


def test_seeds_may_be_tensors(backend, device):
    net = program("gated", device=str(device))
    seeds = torch.tensor([5, 2**62], device=device)
    own = arguments(net, 2, mode="draw", seed=seeds)
    ops.incremental_advance(**own)
    for i in range(2):
        alone = arguments(net, 1, mode="draw", seed=int(seeds[i]), sample_ids=own["sample_ids"][i : i + 1])
        alone["tokens"].copy_(own["tokens"][i : i + 1])
        ops.incremental_advance(**alone)
        assert torch.equal(alone["tokens"], own["tokens"][i : i + 1])


def raw(net: Incremental, n: int, **changes: Any) -> list[Any]:
    """Arguments of the operator itself."""
    own = arguments(net, n)
    values = {
        "state": own["state"].zero_(), "tokens": own["tokens"], "weights": own["weights"],
        "program": net.program.code, "device_program": net.program.on(net.device),
        "vocabulary": net.program.vocabulary, "conditions": own["conditions"], "values": own["values"], "known": None,
        "sample_ids": own["sample_ids"], "seed": 1, "seeds": None, "begin": 0, "end": 4, "action": 2, "logistics": 0,
        "temperature": 1.0, "top_k": 2**31, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "split_ties": False,
        "with_logits": True,
    }  # fmt: skip
    return list((values | changes).values())


def test_opcheck(backend, device, namespace):
    operator = getattr(torch.ops, namespace).incremental_advance.default
    checks = ("test_schema", "test_faketensor")
    opcheck(operator, raw(program("gated", device=str(device)), 2), test_utils=checks)


def test_compiles_without_a_break():
    net = program("gated")
    compiled = torch.compile(ops.incremental_advance, fullgraph=True, backend="aot_eager")
    own, expected = arguments(net, 2, mode="draw"), arguments(net, 2, mode="draw")
    found = compiled(**own)
    assert torch.equal(found[0], ops.incremental_advance(**expected)[0])
    assert torch.equal(own["tokens"], expected["tokens"])


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    net, seed = program("gated, colours", device=str(device)), torch.zeros((), dtype=torch.int64, device=device)
    own = arguments(net, 3, mode="draw", with_logits=True, seed=seed)
    ops.incremental_advance(**own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        log_prob, logits = ops.incremental_advance(**own)
        seed += 1
    for step in range(3):
        own["conditions"].normal_()
        graph.replay()
        twin = arguments(net, 3, mode="draw", with_logits=True, seed=step, conditions=own["conditions"])
        expected = ops.incremental_advance(**twin)
        assert torch.equal(own["tokens"], twin["tokens"])
        assert torch.equal(log_prob, expected[0])
        assert torch.equal(logits, expected[1])


def changed(net: Incremental, section: str, place: tuple[int, int], number: int) -> Tensor:
    """The program's code with another number in it."""
    code = net.program.code.clone()
    view = Program(code).sections()[section]
    view[place] = number
    return code


@pytest.mark.parametrize(
    ("section", "place", "number"),
    [
        ("operations", (2, 0), 9), ("operations", (1, 2), 1000), ("operations", (3, 6), 10**6),
        ("sources", (4, 1), -1), ("sources", (4, 3), 10**6), ("sources", (4, 4), 10**5), ("sources", (4, 0), 3),
        ("instructions", (0, 0), 60), ("instructions", (0, 1), 40), ("tasks", (0, 0), 99), ("tasks", (0, 3), 50),
        ("tasks", (1, 1), -3), ("draws", (0, 0), 5000), ("grids", (0, 0), 0),
    ],
)  # fmt: skip
def test_a_program_that_names_what_is_not_there_is_refused(backend, device, namespace, section, place, number):
    net = program("gated", device=str(device))
    operator = getattr(torch.ops, namespace).incremental_advance.default
    code = changed(net, section, place, number)
    with pytest.raises(RuntimeError, match="^program "):
        operator(*raw(net, 1, program=code, device_program=code.to(device)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, r"tokens has shape \(2, 3\), but expected \(2, 30\)"),
        ({"state": torch.zeros(2, 3)}, r"state has shape \(2, 3\)"),
        ({"state": torch.zeros(2, 3, dtype=torch.float16)}, "state has a dtype that is not supported"),
        ({"weights": torch.zeros(3)}, r"weights has shape \(3,\)"),
        ({"conditions": torch.zeros(2, 5)}, r"conditions has shape \(2, 5\), but expected \(2, 0\)"),
        ({"end": 31}, "steps from 0 to 31 were asked for, but the program has 30"),
        ({"begin": 3, "end": 2}, "steps from 3 to 2 were asked for"),
        ({"known": torch.zeros(2, 30)}, r"known has shape \(2, 30\)"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"sample_ids has shape \(3,\)"),
        ({"logistics": 8}, "no discretized mixture of logistics"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    own = arguments(program("gated"), 2, **changes)
    with pytest.raises(RuntimeError, match=message):
        ops.incremental_advance(**own)


REFUSALS = [
    {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_k": 1.5}, {"top_p": 1.5}, {"min_p": -0.1},
    {"typical_p": 0.0}, {"ties": 3}, {"seed": 2**64}, {"seed": 2**65}, {"seed": -(2**63) - 1}, {"seed": 1.5},
    {"seed": torch.zeros(2)}, {"sample_ids": torch.zeros(2)},
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSALS, ids=str)
def test_seeds_and_filters_are_refused_in_the_words_of_sample_logits(changes):
    own = {"sample_ids": torch.arange(2), "seed": 5} | changes
    with pytest.raises((ValueError, TypeError)) as expected:
        ops.sample_logits(torch.zeros(2, 5), position=0, **own)
    with pytest.raises(expected.type) as error:
        ops.incremental_advance(**arguments(program("gated"), 2, **changes))
    assert str(error.value) == str(expected.value)
    assert str(error.value).startswith(f"{next(iter(changes))} ")


def test_a_mode_that_there_is_not_and_filters_of_a_mixture_are_refused():
    with pytest.raises(ValueError, match="mode is 'guess', but expected one of 'follow', 'score', 'draw'"):
        ops.incremental_advance(**arguments(program("gated"), 1, mode="guess"))
    with pytest.raises(ValueError, match="a mixture of logistics is drawn as it is"):
        ops.incremental_advance(**arguments(program("plus plus"), 1, temperature=0.5))


def test_no_samples_and_no_steps(backend, device):
    net = program("gated", device=str(device))
    log_prob, logits = ops.incremental_advance(**arguments(net, 0, with_logits=True))
    assert log_prob.shape == (0, 30)
    assert logits.shape == (0, 30, 5)
    assert ops.incremental_advance(**arguments(net, 2, begin=4, end=4))[0].shape == (2, 0)
