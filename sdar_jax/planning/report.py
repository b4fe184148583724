"""Shows a plan as a table for people, and as values for programs."""

from typing import Any

from sdar_jax.planning.compile import Compiled
from sdar_jax.planning.nearest import Change
from sdar_jax.planning.roofline import Roofline

_GB, _DAY = 1e9, 86400.0
_SHOWN_LINKS = 8


def values(step: Compiled, roof: Roofline | None, tokens: float) -> dict[str, Any]:
    """Collects plain values: bytes, FLOPs and seconds of one device in one step, unless they say otherwise."""
    result = {
        "topology": step.topology,
        "devices": step.mesh.size,
        "mesh": {axis: size for axis, size in step.mesh.shape.items() if size > 1},
        "fits": step.fits,
        "memory": {
            **step.memory._asdict(),
            "total": step.memory.total,
            "available": step.chip.memory,
        },
        "compile_seconds": step.seconds,
        "tokens_per_step": step.tokens,
        "token_budget": tokens,
    }
    if roof is None or step.counts is None:
        return result
    result["flops"] = {
        "useful": roof.useful_flops,
        "matmuls": roof.matmul_flops,
        "attention": roof.attention_flops,
    }
    result["hbm_bytes"] = roof.hbm_bytes
    result["collectives"] = [link._asdict() for link in roof.links]
    result["seconds"] = {
        "compute": roof.compute,
        "memory": roof.memory,
        "collectives": roof.collectives,
    }
    result["bound"] = roof.bound
    result["overlapped"] = _pace(step, roof, roof.overlapped, tokens)
    result["serial"] = _pace(step, roof, roof.serial, tokens)
    result["loops_of_unknown_length"] = dict(step.counts.unknown)
    return result


def _pace(step: Compiled, roof: Roofline, seconds: float, tokens: float) -> dict[str, float]:
    total = tokens / step.tokens * seconds
    return {
        "step_seconds": seconds,
        "tokens_per_second": step.tokens / seconds,
        "mfu": roof.mfu(seconds, step.chip.bf16_flops),
        "days": total / _DAY,
        "device_hours": total * step.mesh.size / 3600,
    }


def table(plan: dict[str, Any]) -> str:
    """Formats `values` in lines."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "one device"
    lines = [
        f"{plan['topology']}: {plan['devices']} devices, {mesh}; compiled in {plan['compile_seconds']:.0f} s",
        "",
    ]
    lines += _memory_lines(plan["memory"], plan["fits"])
    if "seconds" in plan:
        lines += ["", *_time_lines(plan), "", *_pace_lines(plan)]
    return "\n".join(lines)


def _memory_lines(memory: dict[str, float], fits: bool) -> list[str]:
    names = {
        "frozen": "frozen weights",
        "ema": "moving average",
        "batch": "batch, padding",
        "temporaries": "gradients, activations, temporaries",
    }
    parts = [
        (names.get(name, name), size)
        for name, size in memory.items()
        if name not in ("total", "available")
    ]
    lines = ["memory per device, GB"]
    lines += [f"  {name:<36}{size / _GB:8.2f}" for name, size in parts if size >= 5e6]
    verdict = "fits" if fits else "does not fit"
    return [
        *lines,
        f"  {'total':<36}{memory['total'] / _GB:8.2f} of {memory['available'] / _GB:.0f}: {verdict}",
    ]


def _time_lines(plan: dict[str, Any]) -> list[str]:
    flops = plan["flops"]
    seconds = plan["seconds"]
    lines = ["a step, on each device"]
    work = f"{flops['matmuls'] / 1e12:.1f} TFLOP of matmuls + {flops['attention'] / 1e12:.1f} of attention"
    lines.append(
        f"  {'compute':<14}{seconds['compute']:9.3f} s  {work}; {flops['useful'] / 1e12:.1f} useful"
    )
    lines.append(
        f"  {'memory':<14}{seconds['memory']:9.3f} s  {plan['hbm_bytes'] / _GB:.0f} GB (at most)"
    )
    sent = sum(link["sent"] for link in plan["collectives"])
    lines.append(f"  {'collectives':<14}{seconds['collectives']:9.3f} s  {sent / _GB:.2f} GB sent")
    for link in plan["collectives"][:_SHOWN_LINKS]:
        if link["seconds"] >= 0.01 * seconds["collectives"]:
            name = f"{link['kind']} over {link['axes']}"
            lines.append(f"    {name:<38}{link['seconds']:9.3f} s  {link['sent'] / _GB:.2f} GB")
    lines += [
        f"  {int(n)} x one round of a loop of unknown length: {at}" for at, n in _unknown(plan)
    ]
    return lines


def _unknown(plan: dict[str, Any]) -> list[tuple[str, float]]:
    return list(plan["loops_of_unknown_length"].items())


def _pace_lines(plan: dict[str, Any]) -> list[str]:
    lines = [
        f"bound by {plan['bound']}; {plan['token_budget'] / 1e9:g}B tokens, {plan['tokens_per_step']} per step"
    ]
    lines.append(f"  {'':<22}{'step':>9}{'tokens/s':>12}{'MFU':>7}{'days':>9}{'device-hours':>14}")
    for name, title in (("overlapped", "all overlaps"), ("serial", "nothing overlaps")):
        p = plan[name]
        lines.append(
            f"  {title:<22}{p['step_seconds']:8.3f}s{p['tokens_per_second']:12,.0f}{p['mfu']:7.1%}{p['days']:9.2f}"
            f"{p['device_hours']:14,.0f}"
        )
    return lines


def nearest_lines(change: Change | None, tried: list[tuple[Change, Compiled]]) -> list[str]:
    """Lists what was tried where a step does not fit, and what does."""
    lines = [f"  {change.options}: {step.memory.total / _GB:.1f} GB" for change, step in tried]
    if change is None:
        return ["nothing that was tried fits:", *lines, "  give more devices, or a smaller model"]
    return ["tried:", *lines, f"nearest change that fits: {change.options}"]
