"""Measures the CUDA ops beside torch on the GPU of this machine: `make gpu-pass` runs it after the tests.

Times come from CUDA events, median of repeats after warm-up. "catapult_ext, graph" replays a captured call: what
the kernels take without Python. Every line holds the error against float64.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import catapult_ext as cx
from catapult_ext import ops
from catapult_ext.ops import cuda as cuda_ops
from python_experiments.bench.lines import header, write_lines
from python_experiments.bench.ops import tangent_like_kernel

_SECONDS = 0.8  # of repeats per implementation
_REPEATS = 50


@dataclass(frozen=True)
class GpuCase:
    """Implementations of one thing on the GPU; the first is the baseline, "catapult_ext" is ours (its default version).

    Graphs are made when their turn comes: what they keep counts as their memory, and goes before the next.
    """

    job: str
    shapes: dict[str, int]
    dtype: torch.dtype
    implementations: dict[str, Callable[[], object]]
    error: Callable[[object], float | None] | None = None
    flop: float | None = None
    capture: bool = True
    graphs: dict[str, Callable[[], Callable[[], object]]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    op: str | None = None  # of `cuda.VERSIONS`, each of which is measured


def _time(call: Callable[[], object]) -> tuple[float, float, float, int]:
    """Quartiles of seconds per call, and repeats; a sample is as many calls as fill about 0.2 ms."""

    def sample(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    call()
    once = sample(1)
    count = max(1, min(50, int(2e-4 / max(once, 1e-7))))
    repeats = max(3, min(_REPEATS, int(_SECONDS / max(once * count, 1e-7))))
    samples = [sample(count) for _ in range(repeats)]
    low, median, high = statistics.quantiles(samples, n=4)
    return median, low, high, repeats


def _graphed(call: Callable[[], object]) -> Callable[[], object]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _as_it_is(call: Callable[[], object]) -> Callable[[], object]:
    return call


def _with_version(op: str, version: str, call: Callable[[], object]) -> object:
    cuda_ops.select(op, version)
    try:
        return call()
    finally:
        cuda_ops.select(op, cuda_ops.VERSIONS[op][0])


def _measure(case: GpuCase) -> Iterator[dict[str, object]]:
    calls, ours = dict(case.implementations), ["catapult_ext"]
    for version in () if case.op is None else cuda_ops.VERSIONS[case.op][1:]:
        if version in ("cluster", "fused") and torch.cuda.get_device_capability()[0] < 9:
            continue  # refused there
        ours.append(f"catapult_ext {version}")
        calls[ours[-1]] = partial(_with_version, case.op, version, calls["catapult_ext"])
    makers = {name: partial(_as_it_is, call) for name, call in calls.items()} | case.graphs
    if case.capture:
        makers |= {f"{name}, graph": partial(_graphed, calls[name]) for name in ours}
    baseline, reference = next(iter(makers)), None
    for name, make in makers.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call = make()
        result = call()
        peak = torch.cuda.max_memory_allocated() - before
        error = None if case.error is None or "graph" in name else case.error(result)
        del result
        median, low, high, repeats = _time(call)
        del call
        reference = median if name == baseline else reference
        assert reference is not None
        yield {
            "job": case.job,
            "implementation": name,
            "shapes": case.shapes,
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(),
            "threads": torch.get_num_threads(),
            "rounds": repeats,
            "median_s": median,
            "quartiles_s": [low, high],
            "baseline": baseline,
            "ratio": median / reference,
            "gflops": None if case.flop is None else case.flop / median / 1e9,
            "peak_extra_bytes": peak,
            "error_float64": error,
            **case.tags,
        }
    cuda_ops.check(torch.device("cuda"))


def _gram_case(n: int, widths: list[tuple[int, int]], dtype: torch.dtype) -> GpuCase:
    a = [torch.randn(n, m, dtype=dtype, device="cuda").relu() for m, _ in widths]
    b = [torch.randn(n, w, dtype=dtype, device="cuda") for _, w in widths]
    scale, beta = [1.0] * len(a), [0.1] * len(a)
    out = torch.empty(n, n, dtype=dtype, device="cuda")

    def plain(kind: torch.dtype = dtype) -> Tensor:
        kernel = torch.zeros(n, n, dtype=kind, device="cuda")
        for x, y in zip(a, b, strict=True):
            x, y = x.to(kind), y.to(kind)
            kernel.addcmul_((x @ x.T).add_(0.1), y @ y.T)
        return kernel

    exact = plain(torch.float64)
    root = exact.diagonal().sqrt()

    def error(kernel: object) -> float:
        assert isinstance(kernel, Tensor)
        return float(((kernel.double() - exact).abs() / (root[:, None] * root)).max())

    return GpuCase(
        "gpu_ntk_gram", {"n": n, "layers": len(a), "m": widths[0][0]}, dtype,
        {"torch": plain, "catapult_ext": lambda: ops.ntk_gram(a, b, scale, beta, out=out)},
        error, flop=float(n * n * sum(m + w for m, w in widths)), op="ntk_gram",
    )  # fmt: skip


def _convolution_case(n: int, channels: int, size: int, *, compare: bool = True) -> GpuCase:
    input = torch.randn(n, channels, size, size, device="cuda")
    b = torch.randn(n, 1, channels, size, size, device="cuda")
    kernel = torch.zeros(n, n, device="cuda")

    def plain(x: Tensor = input, y: Tensor = b) -> Tensor:
        total = torch.zeros(n, n, dtype=x.dtype, device="cuda")
        for _, tile in ops.conv_tiles(x, y, kernel_size=(3, 3), padding=(1, 1)):
            flat = tile.flatten(1)
            total.addmm_(flat, flat.T)
        return total

    def unfolded() -> Tensor:
        total = torch.zeros(n, n, device="cuda")
        patches = nn.functional.unfold(input, 3, padding=1).transpose(1, 2)  # [n, positions, 9 channels]
        left = b.flatten(3)[:, 0]  # [n, channels, positions]
        rows = max(1, ops.tiles.TILE_BYTES // (n * channels * 9 * 4))
        for part in left.split(rows, 1):
            flat = torch.bmm(part, patches).flatten(1)  # [n, rows 9 channels]
            total.addmm_(flat, flat.T)
        return total

    def ours() -> Tensor:
        kernel.zero_()
        ops.jacobian_accumulate_conv2d_(kernel, input, b, kernel_size=(3, 3), padding=(1, 1))
        return kernel

    exact = plain(input.double(), b.double()) if compare else None
    weights = channels * channels * 9
    return GpuCase(
        "gpu_jacobian_conv2d", {"n": n, "channels": channels, "image": size}, torch.float32,
        {"torch grouped convolution": plain, "torch unfolded products": unfolded, "catapult_ext": ours},
        None if exact is None
        else lambda got: float((got.double() - exact).abs().max() / exact.abs().max()),  # type: ignore[attr-defined]
        flop=float(n * weights * (2 * size * size + n)), op="jacobian_conv2d",
    )  # fmt: skip


def _eigen_case(n: int, k: int, dtype: torch.dtype, *, warm: bool) -> GpuCase:
    kernel = tangent_like_kernel(n).to("cuda", dtype)
    exact = torch.linalg.eigvalsh(kernel.double())[-k:].flip(0)
    tol = 1e-6 if dtype == torch.float32 else 1e-10
    start = ops.topk_eigh(kernel, k, tol=tol)[1] if warm else None

    def error(result: object) -> float:
        values = result[0]  # type: ignore[index]
        values = values if values.numel() == k else values[-k:].flip(0)
        return float((values.double() - exact).abs().max() / exact[0])

    return GpuCase(
        "gpu_topk_eigh", {"n": n, "k": k}, dtype,
        {
            "torch.linalg.eigh": lambda: torch.linalg.eigh(kernel),
            "catapult_ext": lambda: ops.topk_eigh(kernel, k, start=start, tol=tol),
        },
        error, tags={"start": "warm" if warm else "cold"}, op="topk_eigh",
    )  # fmt: skip


def _norm_case(batch: int, n: int) -> GpuCase:
    kernel = tangent_like_kernel(n, batch).float().to("cuda")
    exact = torch.linalg.eigvalsh(kernel.double())[:, -1]
    return GpuCase(
        "gpu_spectral_norm", {"batch": batch, "n": n}, torch.float32,
        {
            "torch.linalg.eigvalsh": lambda: torch.linalg.eigvalsh(kernel)[:, -1],
            "catapult_ext": lambda: ops.spectral_norm(kernel),
        },
        lambda got: float(((got.double() - exact) / exact).abs().max()),  # type: ignore[attr-defined]
        op="spectral_norm",
    )  # fmt: skip


def _agop_case(rows: int, d: int) -> GpuCase:
    g = torch.randn(rows, d, device="cuda")
    out = torch.zeros(d, d, device="cuda")
    exact = g.double().T @ g.double() / rows

    def ours() -> Tensor:
        return ops.agop_reduce(g, 1 / rows, out=out.zero_())

    return GpuCase(
        "gpu_agop_reduce", {"rows": rows, "d": d}, torch.float32,
        {"torch": lambda: (g.T @ g).div_(rows), "catapult_ext": ours},
        lambda got: float((got.double() - exact).abs().max() / exact.abs().max()),  # type: ignore[attr-defined]
        flop=float(rows * d * d),
    )  # fmt: skip


def _step_case(job: str, shapes: dict[str, int], model: nn.Module, x: Tensor) -> GpuCase:
    """A plain step and an observed one (kernel, 10 eigenpairs, loss split, critical rate), eager and as graphs."""
    model, x, y, lr = model.cuda(), x.cuda(), torch.randn(len(x), 1, device="cuda"), 1e-6
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr)
    observer, replaying = (cx.Observer(model, k=10, captured=captured) for captured in (False, True))

    def plain() -> None:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

    def bare() -> None:
        gradients = torch.autograd.grad((model(x) - y).square().mean(), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-lr)

    def observed(by: cx.Observer = observer) -> None:
        seen = by(x, y)
        _ = seen.top_loss, seen.critical_lr
        seen.step_(lr)

    return GpuCase(
        job, {"n": len(x), **shapes}, torch.float32, {"torch": plain, "catapult_ext": observed}, capture=False,
        graphs={
            "torch, graph": lambda: _graphed(bare),
            "catapult_ext, graph of the pass": lambda: partial(observed, replaying),
            "catapult_ext, graph": lambda: observer.capture(x, y, lr),
            "catapult_ext, graph with overlap": lambda: observer.capture(x, y, lr, overlap=True),
        },
    )  # fmt: skip


def _fcn5_step() -> GpuCase:
    torch.manual_seed(0)
    model = cx.models.FCN(3072, 1024, 5)
    return _step_case("gpu_fcn5_step", {"width": 1024, "d": 3072}, model, torch.randn(128, 3072))


def _cnn_step() -> GpuCase:
    torch.manual_seed(0)
    model = cx.models.CNN(3, 32, 512, 4)
    return _step_case("gpu_cnn_step", {"channels": 512, "depth": 4}, model, torch.randn(128, 3, 32, 32))


def _chain_case(batch: int, steps: int = 64) -> GpuCase:
    """Rates of zero, so that every step of every repeat starts from the same parameters."""
    torch.manual_seed(0)
    model = cx.models.FCN(100, 1024, 2).cuda()
    x, y = torch.randn(2000, 100, device="cuda"), torch.randn(2000, 1, device="cuda")
    index = torch.randint(2000, (steps * batch,), device="cuda")
    sizes = torch.full((steps,), batch)
    rates = torch.zeros(steps, dtype=torch.float64, device="cuda")
    batches = [(x[i], y[i]) for i in index.split(batch)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first, last = (p.detach().clone() for p in model.parameters())
    layers = [ops.ChainLayer(first, None, 100**-0.5), ops.ChainLayer(last, None, 1024**-0.5)]

    def plain() -> None:
        for inputs, targets in batches:
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()

    def ours() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return ops.chain_sgd_(layers, x, y, index, sizes, rates)

    def error(result: object) -> float | None:
        if result is None:
            return None  # the plain steps have nothing to show
        exact = ops.chain_sgd_(
            [layer._replace(weight=layer.weight.double().cpu()) for layer in layers],
            x.double().cpu(), y.double().cpu(), index.cpu(), sizes, rates.cpu(),
        )  # fmt: skip
        pairs = zip(result, exact, strict=True)  # type: ignore[call-overload]
        return max(float((got.double().cpu() / wanted - 1).abs().max()) for got, wanted in pairs)

    return GpuCase(
        "gpu_chain_sgd", {"batch": batch, "steps": steps, "width": 1024, "d": 100}, torch.float32,
        {"torch": plain, "catapult_ext": ours}, error,
    )  # fmt: skip


def _ceiling_cases() -> Iterator[GpuCase]:
    """What the chip gives: a copy of 1 GB (bytes read and written) and a float32 product."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    yield GpuCase(
        "gpu_ceiling_copy", {"bytes": 2 * source.nbytes}, torch.float32, {"torch": lambda: target.copy_(source)},
        flop=2.0 * source.nbytes, capture=False, tags={"unit": "gflops holds GB/s"},
    )  # fmt: skip
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(8192, 8192, dtype=dtype, device="cuda")
        yield GpuCase(
            "gpu_ceiling_product", {"n": 8192}, dtype, {"torch": lambda a=a: a @ a}, flop=2.0 * 8192**3, capture=False
        )  # fmt: skip


def _cases() -> Iterator[tuple[str, Callable[[], GpuCase]]]:
    fcn5 = [(3072, 1024), (1024, 1024), (1024, 1024), (1024, 1024), (1024, 1)]
    for dtype in (torch.float32, torch.float64):
        for n, widths in ((128, fcn5), (2000, [(1024, 1024)]), (5000, [(1024, 1024)])):
            yield f"gram {n} {dtype}", lambda n=n, widths=widths, dtype=dtype: _gram_case(n, widths, dtype)
        for n in (128, 512, 2000, 5000):
            for warm in (False, True) if n > 256 else (False,):
                yield (
                    f"topk {n} {dtype} {warm}",
                    lambda n=n, dtype=dtype, warm=warm: _eigen_case(n, 10, dtype, warm=warm),
                )
    yield "conv", lambda: _convolution_case(128, 64, 32)
    yield "conv 512", lambda: _convolution_case(32, 512, 32)
    yield "conv 512 of 128", lambda: _convolution_case(128, 512, 32, compare=False)
    for batch, n in ((2000, 5), (500, 20), (500, 100)):
        yield f"norm {n}", lambda batch=batch, n=n: _norm_case(batch, n)
    yield "agop", lambda: _agop_case(5000, 3072)
    for batch in (5, 32):
        yield f"chain {batch}", lambda batch=batch: _chain_case(batch)
    yield "fcn5 step", _fcn5_step
    yield "cnn step", _cnn_step


def main(out: Path) -> int:
    """Measure everything, append to `out`/gpu.jsonl; return how many cases failed."""
    if not torch.cuda.is_available():
        raise SystemExit("gpu_pass: torch sees no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    common = {**header(), "command": " ".join(sys.argv), "cuda": cx.build_info()["cuda"]}
    failures = 0

    def record(name: str, make: Callable[[], GpuCase]) -> int:
        try:
            lines = [common | line for line in _measure(make())]
        except Exception as error:  # one case that fails must not cost the others' measurements
            write_lines(
                out / "gpu.jsonl", [common | {"job": name, "failed": f"{type(error).__name__}: {error}"}]
            )
            print(f"{name}: FAILED: {error}", flush=True)
            return 1
        write_lines(out / "gpu.jsonl", lines)
        for line in lines:
            print(
                f"{line['job']} {line['shapes']} {line['dtype']} {line['implementation']}: "
                f"{line['median_s'] * 1e6:.1f} us, ratio {line['ratio']:.3g}, error {line['error_float64']}",
                flush=True,
            )
        torch.cuda.empty_cache()
        return 0

    for case in _ceiling_cases():
        failures += record(case.job, lambda case=case: case)
    for name, make in _cases():
        failures += record(name, make)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1])) else 0)
