"""Numbers in a prediction: those that the program knows, those that nobody knows, and checks."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import rnn
from torch.utils._pytree import tree_leaves

from tfswa_lab.memory.predict import predict

MIB = 2**20


def run(function):
    """Run a function as a step, and return what it returned."""
    found = []
    predict(lambda: lambda: found.append(function()), steps=1)
    return found[0]


def unknown():
    """A loss that depends on random weights."""
    return nn.Linear(8, 8)(torch.randn(4, 8)).square().mean()


def crop(length):
    def make_step():
        net, lengths = nn.Linear(64, 64), torch.tensor([4000, 3000])

        def step():
            n = int(lengths.max()) if length is None else length
            net(torch.randn(2, 5000, 64)[:, :n]).square().sum().backward()

        return step

    return make_step


def test_a_length_from_a_list_is_a_size():
    known, written = predict(crop(None)), predict(crop(4000))
    assert known.peak == written.peak
    assert known.peak / MIB == pytest.approx(10.29, abs=0.01)


KNOWN = {
    "arithmetic": lambda: torch.ceil(torch.as_tensor(44.1)).long() * 2 + 1,
    "of shapes": lambda: torch.tensor(torch.zeros(3, 5).shape).prod(),
    "in place": lambda: torch.zeros(3, dtype=torch.int64).add_(7).sum(),
    "a view written to": lambda: written_view(),
    "arange": lambda: torch.arange(10)[torch.arange(10) % 3 == 0].sum(),
    "cumulated": lambda: torch.tensor([2, 5, 1]).cumsum(0)[-1],
    "sorted": lambda: torch.tensor([2, 5, 1]).sort(descending=True)[0][0],
    "on the GPU": lambda: torch.tensor([2, 5, 1], device="cuda").max().cpu(),
    "of zeros like": lambda: torch.zeros_like(torch.randn(5)).sum().long() + 3,
    "different": lambda: torch.unique(torch.tensor([1, 2, 2, 3])).numel(),
    "repeated": lambda: len(torch.zeros(3, 2).repeat_interleave(torch.tensor([1, 2, 5]), 0)),
    "of a list in place": lambda: added([torch.tensor(3), torch.tensor(4)]),
    "filled": lambda: torch.empty(3, dtype=torch.int64).fill_(4).sum(),
    "of numpy": lambda: torch.from_numpy(np.array([3, 8])).max(),
}


def added(counts):
    torch._foreach_add_(counts, 1)
    return counts[0] * counts[1]


def written_view():
    x = torch.zeros(4, dtype=torch.int64)
    x[1:].fill_(5)
    return x.sum()


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_of_the_program_are_known(name):
    assert int(run(lambda: int(KNOWN[name]()))) == int(KNOWN[name]() if name != "on the GPU" else 5)


def test_a_write_of_unknown_numbers_makes_a_tensor_unknown():
    def step():
        x = torch.zeros(4)
        x[:2] = torch.randn(2)
        return int(x[0])

    with pytest.raises(NotImplementedError, match="depends on the values"):
        predict(lambda: step)


def test_a_write_to_an_older_tensor_changes_what_is_known_of_it():
    older = torch.tensor([3.0, 4.0])

    def known():
        older.add_(1)
        return torch.zeros(int(older.sum())).shape

    found = []
    predict(lambda: lambda: found.append(known()))
    assert found == [(9,), (11,)]
    with pytest.raises(NotImplementedError, match="depends on the values"):
        predict(lambda: lambda: (older.add_(torch.randn(2)), int(older.sum())))
    assert older.tolist() == [3, 4]


def test_a_mask_that_is_known_selects_its_number_of_rows():
    mask = run(lambda: torch.randn(100, 10)[torch.arange(100) < 30].shape)
    assert mask == (30, 10)
    assert run(lambda: torch.randn(100).masked_select(torch.arange(100) < 30).shape) == (30,)
    assert run(lambda: (torch.arange(100) < 30).nonzero().shape) == (30, 1)


def test_a_number_in_all_rows_of_a_mask_needs_no_count():
    def step():
        x = torch.randn(100, 3)
        x[x[:, 0] > 0] = 0.0
        return x.shape

    assert run(step) == (100, 3)


REFUSED = {
    "size": lambda: torch.zeros(unknown().item(), 3),
    "size of a whole number": lambda: torch.zeros(torch.randint(9, (1,)).item(), 3),
    "int": lambda: int(unknown()),
    "int of item": lambda: int(unknown().item()),
    "slice": lambda: torch.zeros(9)[: torch.randint(9, (1,)).item()],
    "slice by a tensor": lambda: torch.zeros(9)[: torch.randint(9, (1,))],
    "range": lambda: range(torch.randint(9, (1,)).item()),
    "repeat": lambda: [0] * torch.randint(9, (1,)).item(),
    "round": lambda: round(unknown().item()),
    "branch": lambda: 1 if unknown() > 1 else 2,
    "branch of item": lambda: 1 if unknown().item() > 1 else 2,
    "all outside a check": lambda: 1 if (torch.randn(3) > 0).all() else 2,
    "any": lambda: 1 if (torch.randn(3) > 0).any() else 2,
    "while": lambda: [0 for _ in iter(lambda: bool(unknown() > 0), False)],
    "equal": lambda: 1 if torch.equal(torch.randn(2), torch.zeros(2)) else 2,
    "mask": lambda: torch.randn(9)[torch.randn(9) > 0],
    "nonzero": lambda: torch.randn(9).nonzero(),
    "classes": lambda: F.one_hot(torch.randint(9, (5,))),
    "array of whole numbers": lambda: torch.randn(2, 9).argmax(1).numpy(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_number_that_nobody_knows_is_refused_with_its_line(name):
    line = REFUSED[name].__code__.co_firstlineno
    with pytest.raises(NotImplementedError, match="Three ways out") as refused:
        predict(lambda: REFUSED[name])
    assert f" at test_values.py:{line} " in str(refused.value)
    assert f"values={{'test_values.py:{line}': …}}" in str(refused.value)


def test_a_refusal_that_a_program_hides_is_told_all_the_same():
    def step():
        try:
            return int(unknown())
        except NotImplementedError:
            return 1

    with pytest.raises(NotImplementedError, match="depends on the values"):
        predict(lambda: step)


def test_values_can_be_given():
    def step():
        n = int(torch.randint(9, (1,)).item())
        x = torch.zeros(n, 4)
        return x[torch.randn(n) > 0].shape

    first = step.__code__.co_firstlineno
    given = {f"test_values.py:{first + 1}": 7, f"test_values.py:{first + 3}": 5}
    found = []
    predict(lambda: lambda: found.append(step()), values=given)
    assert found == [(5, 4)] * 2
    with pytest.raises(ValueError, match=r"values: no number was asked for at other\.py:3"):
        predict(lambda: step, values=given | {"other.py:3": 1})


def test_whole_numbers_stay_whole():
    labels = lambda: torch.randint(9, (16,))  # noqa: E731
    assert run(lambda: torch.tensor(labels().tolist()).dtype) is torch.int64
    assert run(lambda: torch.full((3,), labels()[0].item()).dtype) is torch.int64
    assert run(lambda: (torch.arange(3) + labels().sum().item()).dtype) is torch.int64
    assert run(lambda: (torch.arange(3) * (torch.randn(2) > 0).any().item()).dtype) is torch.int64
    loss = run(lambda: F.cross_entropy(torch.randn(16, 9), torch.tensor(labels().tolist())).shape)
    assert loss == ()


def test_what_was_made_with_an_unknown_number_is_unknown():
    with pytest.raises(NotImplementedError, match="depends on the values"):
        predict(lambda: lambda: int(torch.full((2,), torch.randint(9, (1,)).item())[0]))


def test_infinities_and_nans_that_the_program_writes_are_known():
    assert run(lambda: bool(torch.isnan(torch.tensor(math.nan)))) is True
    assert run(lambda: int(torch.isfinite(torch.tensor([1.0, math.inf, math.nan])).sum())) == 1
    assert run(lambda: math.isnan(math.nan)) is True


def masked():
    return torch.randn(300, 300).masked_fill(torch.ones(300, 300) > 0, -math.inf)


def test_infinities_of_large_masks_are_not_denied():
    with pytest.raises(NotImplementedError, match="a branch"):
        predict(lambda: lambda: 1 if torch.isinf(masked()).any() else 2)


def test_arrays_of_unknown_numbers_choose_nothing():
    array = lambda: torch.randn(4, 3).numpy()  # noqa: E731

    def logged():
        y = array()
        assert not np.isnan(y).any()
        assert np.isfinite(y.mean())
        assert math.isfinite(y.mean())
        return f"{y.mean():.2f} {y.std():.1f} {(y * 2 + 1).shape}"

    assert run(logged) == "nan nan (4, 3)"
    for choose in (
        lambda: np.argmax(array()),
        lambda: array().argmax(),
        lambda: 1 if array().mean() > 0 else 2,
        lambda: int((array() > 0).sum()),
        lambda: array().astype(int),
    ):
        with pytest.raises(NotImplementedError, match="depends on the values"):
            predict(lambda choose=choose: choose)


def test_a_comparison_of_a_float_is_a_branch():
    with pytest.raises(NotImplementedError, match="a branch"):
        predict(lambda: lambda: 1 if float(unknown()) < 1e9 else 2)


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd, torch.func.jacrev])
def test_function_transforms_do_not_end_the_process(transform):
    assert run(lambda: transform(lambda x: (x**2).sum())(torch.randn(3)).shape)[0] == 3


def test_what_was_compiled_before_is_predicted_as_it_runs_without():
    compiled = torch.compile(nn.Linear(8, 8))
    assert predict(lambda: lambda: compiled(torch.randn(2, 8))).peak > 0


def test_batches_of_numpy_are_counted_as_long_as_they_live():
    batch = np.zeros((1000, 256), np.float32)

    def make_step():
        net = nn.Linear(256, 1).cuda()
        return lambda: net(torch.from_numpy(batch.copy()).cuda() * 2).sum().backward()

    found = predict(make_step, steps=4)
    assert found.host.allocated == batch.nbytes
    assert found.timeline.peak().allocated < 2.2 * batch.nbytes


def test_lazy_modules_are_refused():
    with pytest.raises(NotImplementedError, match=r"a lazy module at test_values\.py"):
        predict(lambda: lambda: nn.LazyLinear(3)(torch.randn(2, 8)))


def checks():
    x = torch.randn(8, 4)
    y = torch.cat([x, x])
    assert (y[:8] == x).all()
    assert not torch.isnan(y).any(), "finite"
    assert torch.allclose(x, x + 0)
    assert x.sum() < 1e9
    assert unknown().item() >= 0
    if not torch.isfinite(y).all():
        raise ValueError
    if (y > 1e9).any() or torch.isinf(unknown()):
        raise ValueError
    if not (torch.equal(x, y[:8]) and math.isfinite(unknown().item())):
        message = f"{x.shape}"
        raise ValueError(message)
    if torch.isnan(unknown()):
        return "skipped"
    torch.distributions.Normal(x, x.exp(), validate_args=True).log_prob(y[:8])
    return "passed"


def test_checks_pass():
    assert run(checks) == "passed"


def test_a_check_may_have_a_loop_before_its_error():
    def step():
        if (torch.randn(3) > 9).any():
            n = 3
            while n:
                n -= 1
            raise ValueError(n)
        return "passed"

    assert run(step) == "passed"


def test_lines_of_ordinary_loops_work(tmp_path):
    def make_step():
        net = nn.Linear(64, 64).cuda()
        optimizer = torch.optim.AdamW(net.parameters())
        scaler = torch.amp.GradScaler("cuda")
        history, best = [], []

        def step():
            torch.cuda.reset_peak_memory_stats()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            x = torch.randn(8, 64, device="cuda")
            y = net(x)
            loss = y.square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            history.append(loss.item())
            text = f"{loss:.3f} {loss.item():6.2f} {loss} {sum(history) / len(history):d}"
            assert "nan" in text
            assert torch.tensor([loss, loss]).mean().item() != math.exp(history[-1])
            best.append(round(loss.item(), 3))
            assert len(y.tolist()) == 8
            assert y.detach().cpu().numpy().shape == (8, 64)
            assert np.isfinite(loss.item())
            assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated() > 4 * 64 * 64
            assert torch.cuda.get_device_name()
            with torch.cuda.stream(torch.cuda.Stream()):
                x.record_stream(torch.cuda.current_stream())
            torch.save(net.state_dict(), tmp_path / "weights.pt")
            return f"{event.elapsed_time(event):.1f} ms, {(y.argmax(1) == 0).sum().item() / 8:.0%}"

        return step

    assert predict(make_step).peak > 0
    assert not list(tmp_path.iterdir()), "a prediction writes no checkpoint"


def test_float_of_a_tensor_is_nan_and_the_budget_says_so():
    found = predict(lambda: lambda: float(unknown()), steps=1)
    assert any("float() of a tensor at test_values.py" in sentence for sentence in found.budget)


def test_compiled_models_are_predicted_as_they_run_without():
    def make_step(compiled):
        net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        net = torch.compile(net) if compiled else net
        return lambda: net(torch.randn(128, 64)).sum().backward()

    found = predict(lambda: make_step(compiled=True))
    assert found.peak == predict(lambda: make_step(compiled=False)).peak
    assert any("compiled kernels keep less" in sentence for sentence in found.budget)


def test_weights_can_be_loaded_from_files(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = nn.Linear(1024, 64).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    save_file(weights, tmp_path / "w.safetensors")
    loads = (
        lambda: torch.load(tmp_path / "w.pt", map_location="cuda"),
        lambda: torch.load(tmp_path / "w.pt", map_location="cpu"),
        lambda: load_file(tmp_path / "w.safetensors", device="cuda"),
        lambda: load_file(tmp_path / "w.safetensors"),
    )

    def make_step(load):
        net = nn.Linear(1024, 64).cuda()
        net.load_state_dict(load())
        return lambda: net(torch.randn(8, 1024, device="cuda")).sum().backward()

    peaks = {predict(lambda load=load: make_step(load)).peak for load in loads}
    assert len(peaks) == 1


def test_the_address_of_a_tensor_is_refused():
    with pytest.raises(NotImplementedError, match=r"address of a tensor at test_values\.py"):
        predict(lambda: lambda: torch.zeros(3).data_ptr())


def ctc(lengths):
    def make_step():
        net = nn.Linear(64, 30)
        targets = torch.randint(1, 30, (4, 12))

        def step():
            log_probs = net(torch.randn(50, 4, 64)).log_softmax(-1)
            F.ctc_loss(log_probs, targets, torch.full((4,), 50), lengths()).backward()

        return step

    return make_step


def test_ctc_loss_takes_unknown_lengths_to_be_the_longest():
    known = predict(ctc(lambda: torch.tensor([12, 10, 9, 3])))
    bound = predict(ctc(lambda: torch.randint(1, 12, (4,))))
    assert known.peak == bound.peak
    assert any("taken to be the longest" in sentence for sentence in bound.budget)
    shorter = predict(ctc(lambda: torch.tensor([3, 3, 3, 3])))
    blocks = [b for b in shorter.timeline.blocks if b.shape == (4, 50, 2 * 3 + 1)]
    assert len(blocks) == 2 * 2, "forward and backward variables of two steps"


def test_packed_sequences_are_predicted_with_their_padding():
    net = lambda: nn.LSTM(64, 32, batch_first=True, bidirectional=True)  # noqa: E731

    def packed():
        lstm, x = net(), torch.randn(3, 10, 64)
        lengths = torch.tensor([10, 8, 3])

        def step():
            rows = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, _ = rnn.pad_packed_sequence(lstm(rows)[0], batch_first=True)
            assert y.shape == (3, 10, 64)
            y.sum().backward()

        return step

    def padded():
        lstm, x = net(), torch.randn(3, 10, 64)
        return lambda: lstm(x)[0].sum().backward()

    found, whole = predict(packed), predict(padded)
    assert whole.peak <= found.peak < 1.2 * whole.peak
    assert any("packed sequences at test_values.py" in sentence for sentence in found.budget)


def test_a_data_loader_counts_on_the_host():
    from torch.utils.data import DataLoader, TensorDataset

    def make_step(**options):
        data = TensorDataset(torch.randn(1000, 64), torch.arange(1000))
        batches = iter(DataLoader(data, batch_size=100, shuffle=True, **options))
        net = nn.Linear(64, 64).cuda()

        def step():
            x, _ = next(batches)
            net(x.cuda(non_blocking=True)).sum().backward()

        return step

    plain = predict(make_step)
    assert plain.host.allocated == 4 * 1000 * 64 + 8 * 1000 + 4 * 100 * 64 + 8 * 100
    pinned = predict(lambda: make_step(num_workers=2, pin_memory=True))
    assert pinned.peak == plain.peak
    assert pinned.host.allocated > plain.host.allocated
    assert any("workers of a DataLoader" in sentence for sentence in pinned.budget)


def test_a_random_choice_of_a_library_takes_the_likelier_outcome(monkeypatch):
    code = compile("def skips(p): return bool(torch.rand([]) < p)", torch.__file__, "exec")
    library = {"torch": torch}
    exec(code, library)
    assert run(lambda: library["skips"](0.1)) is False
    assert run(lambda: library["skips"](0.9)) is True
    with pytest.raises(NotImplementedError, match="a branch"):
        predict(lambda: lambda: 1 if torch.rand([]) < 0.1 else 2)


def test_the_size_of_the_gpu_is_not_made_up():
    for ask in (
        lambda: torch.cuda.mem_get_info(),
        lambda: torch.cuda.get_device_properties(0).total_memory,
    ):
        with pytest.raises(NotImplementedError, match="does not know it"):
            predict(lambda ask=ask: ask)


def test_defaults_of_a_program_end_with_it():
    def make_step():
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.float64)
        return lambda: torch.randn(1000)

    assert predict(make_step).peak == 8192
    assert torch.zeros(1).dtype is torch.float32
    assert torch.zeros(1).device.type == "cpu"


def older_model(tied):
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    if tied:
        net[2].weight = net[0].weight
    return net, torch.optim.Adam(net.parameters(), fused=True)


def moved(net, optimizer):
    net.cuda()
    ema = copy.deepcopy(net)

    def step():
        net(torch.ones(4, 8, device="cuda")).sum().backward()
        optimizer.step()
        with torch.no_grad():
            ema[0].weight.lerp_(net[0].weight, 0.1)

    return step


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_is_older_than_the_prediction_counts_as_much(tied):
    older = older_model(tied)
    inside = predict(lambda: moved(*older_model(tied)))
    outside = predict(lambda: moved(*older))
    assert outside.peak == inside.peak
    assert outside.by_category() == inside.by_category()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_that_is_older_than_the_prediction_stays_as_it_was(device):
    net, optimizer = older_model(tied=True)
    net(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    weight, gradient = net[0].weight, net[0].weight.grad.clone()
    count = torch.zeros(3)

    def make_step():
        net.to(device)

        def step():
            optimizer.zero_grad(set_to_none=False)
            net(torch.ones(4, 8, device=device)).sum().backward()
            optimizer.step()
            nn.init.zeros_(net[2].bias)
            count.add_(1)
            count[0] = 5.0

        return step

    predict(make_step)
    assert net[0].weight is net[2].weight is weight is optimizer.param_groups[0]["params"][0]
    assert torch.equal(weight.grad, gradient)
    assert not count.any()
    for before, after in zip(state, (net.state_dict(), optimizer.state_dict()), strict=True):
        leaves = zip(tree_leaves(before), tree_leaves(after), strict=True)
        for one, other in leaves:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    net(torch.ones(4, 8)).sum().backward()
    optimizer.step()


def test_a_deep_copy_is_counted_once():
    def make_step(copies):
        first = nn.Linear(512, 512, bias=False)
        nets = [copy.deepcopy(first) if copies else nn.Linear(512, 512, bias=False) for _ in "abcd"]
        net = nn.Sequential(*nets).cuda()
        return lambda: net(torch.randn(4, 512, device="cuda")).sum().backward()

    assert predict(lambda: make_step(True)).peak == predict(lambda: make_step(False)).peak


@pytest.mark.skipif(sys.version_info < (3, 11), reason="positions of instructions")
def test_a_check_in_a_cell_without_source_is_a_branch():
    space = {"torch": torch}
    exec("def step():\n    assert (torch.randn(3) > 0).all()", space)
    with pytest.raises(NotImplementedError, match="a branch at <string>:2"):
        predict(lambda: space["step"])
