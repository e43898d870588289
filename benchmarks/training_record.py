"""The record of `benchmarks.training` in Markdown, from the JSON beside it."""

from typing import Any

from benchmarks.training_cases import CASES
from benchmarks.training_sides import PEER

_INTRODUCTION = """# Training

`python -m benchmarks.training`: see the docstring of that file for how both sides are kept alike,
and what a token is.
"""
_SECONDS = ("cpu_s", "epoch_s")
_HEAD = "| case | side | tokens an epoch | s an epoch | tokens/s | beside the peer | NDCG@10 |"


def render(found: dict[str, Any]) -> str:
    """The whole record; a case that was not run is left out."""
    parts = [_INTRODUCTION]
    compared = {name: found[name] for name in CASES if name in found}
    if compared:
        parts.append(_render_compared(compared))
    renderers = {
        "scaling": _render_scaling,
        "loading": _render_loading,
        "huge-pages": _render_huge_pages,
        "compile": _render_compile,
        "gpu": _render_gpu,
    }
    parts += [
        f"{renderers[name](found[name])}\n{found[name]['machine']}.\n"
        for name in renderers
        if name in found
    ]
    return "\n".join(parts)


def _render_compared(compared: dict[str, dict[str, Any]]) -> str:
    some = next(iter(compared.values()))
    rows = [row for name, case in compared.items() for row in _rows(name, case)]
    versions = sorted(
        {f"{side}: {of['versions']}" for case in compared.values() for side, of in _sides(case)}
    )
    lines = [
        f"## Beside {PEER}",
        "",
        f"{some['dataset']}, {some['epochs']} epochs, {some['threads']} threads; seconds are the "
        "median epoch's, without validation.",
        *[f"{line}." for line in versions],
        *[f"{name}: {case['machine']}." for name, case in compared.items()],
        "",
        _HEAD,
        "|" + "---|" * (_HEAD.count("|") - 1),
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _rows(name: str, case: dict[str, Any]) -> list[str]:
    peer = case["sides"].get(PEER)
    rows = []
    for side, figures in _sides(case):
        ratio = f"{figures['tokens_per_s'] / peer['tokens_per_s']:.2f}" if peer else "not measured"
        rows.append(
            f"| {name} | {side} | {figures['tokens']:,} | {figures['epoch_s']:.1f} "
            f"| {figures['tokens_per_s']:,.0f} | {ratio} | {figures['ndcg10']:.4f} |"
        )
    return rows


def _sides(case: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(case["sides"].items())


def _render_scaling(found: dict[str, Any]) -> str:
    rows = [
        f"| {of['workers']} | {of['epoch_s']:.1f} | {of['tokens_per_s']:,} "
        f"| {'not measured' if of['start_s'] is None else of['start_s']} |"
        for of in found["workers"]
    ]
    lines = [
        "## Under Ray Train",
        "",
        f"{found['recipe']} on {found['users']:,} users, one thread a worker. An epoch of the "
        f"plain trainer takes {found['plain_epoch_s']:.1f} s, validation included; under Ray, "
        f"report and checkpoint included, one worker takes {abs(found['overhead']):.1%} "
        f"{'less' if found['overhead'] < 0 else 'more'}. Before the "
        "first epoch the job reads the sequences and starts its workers.",
        "",
        "| workers | s an epoch | tokens/s | s before the first epoch |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _render_loading(found: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["stages"].items())
    return (
        "## Loading\n\n"
        f"From the sequences table of {found['users']:,} users to the first batch: "
        f"{found['seconds']:.1f} s ({stages}).\n"
    )


def _render_huge_pages(found: dict[str, Any]) -> str:
    sides = [found[side] for side in ("with", "without")]
    cpu_s, epoch_s = (" and ".join(f"{of[name]:.1f}" for of in sides) for name in _SECONDS)
    faults = " and ".join(f"{of['faults']:,.0f}" for of in sides)
    return (
        "## Huge pages\n\n"
        f"{found['recipe']} on {found['users']:,} users, one thread; an epoch of the plain trainer "
        "with the huge pages that a job asks for and without, in turn, medians: "
        f"{cpu_s} s of CPU, {epoch_s} s, {faults} page faults, so that they save "
        f"{found['saved']:.1%} of the CPU. Linux: `{found['pages']}`.\n"
    )


def _render_compile(found: dict[str, Any]) -> str:
    if not found["is_measured"]:
        return f"## Compiled\n\nNot measured: {found['reason']}.\n"
    return (
        "## Compiled\n\n"
        f"{found['recipe']} on {found['dataset']}, {found['dtype']}, {found['threads']} threads, "
        f"medians of {found['epochs']} epochs, with and without torch.compile in turn: "
        f"{found['compiled_epoch_s']:.1f} s an epoch compiled, {found['eager_epoch_s']:.1f} s as "
        f"written, so that compiling saves {found['saved']:.1%} of it.\n"
    )


def _render_gpu(found: dict[str, Any]) -> str:
    if not found["is_measured"]:
        return f"## GPU\n\nNot measured: {found['reason']}\n"
    epoch, plan = found["epoch"], found["projection"]
    share = epoch["utilisation"]
    lines = [
        "## GPU",
        "",
        f"{found['device']}; 256 wide, 4 layers, 4 heads, 200 positions on ml-1m.txt: "
        f"{epoch['epoch_s']:.1f} s an epoch, {epoch['tokens_per_s']:,} tokens/s, "
        f"{epoch['tflops_per_s']} TFLOP/s of the model's own products"
        + (f", {share:.1%} of the data sheet's." if share else "."),
        "",
        f"Hours are projected, not measured: {plan['users']:,} users x {plan['events']} training "
        "events, over the tokens/s of the row; on one such device, without reading the data, "
        "validations and checkpoints.",
        "",
        f"| 2 M items x 256, batch 256 x 50 | peak memory, GiB | tokens/s | h an epoch "
        f"| h of {plan['epochs']} epochs |",
        "|---|---|---|---|---|",
        *[
            f"| {name} | {of['peak_gib']} | {of['tokens_per_s']:,} | {of['projected_epoch_h']:.2f} "
            f"| {plan['epochs'] * of['projected_epoch_h']:.1f} |"
            for name, of in found["large"].items()
        ],
    ]
    return "\n".join(lines) + "\n"
