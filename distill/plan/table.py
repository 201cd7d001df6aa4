"""A plan as a table: bytes by network, then what each turn does, and the peak."""

from __future__ import annotations

from distill.plan.plan import Peak, Plan, Strategy

GIB = 2**30


def states_table(plan: Plan) -> list[str]:
    """One line a role and a sum, in GiB: states, and what its calls keep in each turn. Of one device that shards nothing."""
    kept = [turn for turn in plan.turns if turn.kept.total()]
    head = "".join(f"{f'kept ({turn.player})':>18}" for turn in kept)
    lines = [f"{'GiB':<16}{'weights':>10}{'gradients':>11}{'optimiser':>11}{head}  trained by"]
    totals = [0.0] * (3 + len(kept))
    for name, row in plan.rows.items():
        sizes = [row.weights, row.gradients, row.optimizer, *(turn.kept[name] for turn in kept)]
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        lines.append(f"{name:<16}{_sizes(sizes)}  {row.player}".rstrip())
    return [*lines, f"{'sum':<16}{_sizes(totals)}"]


def _sizes(sizes: list[int] | list[float]) -> str:
    widths = [10, 11, 11, *[18] * (len(sizes) - 3)]
    return "".join(f"{size / GIB:>{width}.2f}" for size, width in zip(sizes, widths, strict=True))


def turns_table(plan: Plan, devices: int, strategy: Strategy, operations: float, bytes_sent: float) -> list[str]:
    """One line a turn: its peak beside the lasting states, evaluations, and what a step takes at the stated rates a second."""
    head = f"{'a step':<12}{'peak GiB':>9}  {'in its':<15}{'TFLOP':>9}{'GB sent':>9}{'seconds':>9}  evaluations of a batch"
    lines = [head]
    for turn in plan.turns:
        work = plan.batches(turn) * turn.flops / 1e12
        sent = plan.sent(turn, devices, strategy) / 1e9
        seconds = plan.seconds(turn, operations, bytes_sent, devices, strategy)
        evaluations = ", ".join(f"{name} {count}" for name, count in turn.evaluations.items())
        figures = f"{turn.peak / GIB:>9.2f}  {turn.when:<15}{work:>9.2f}{sent:>9.2f}{seconds:>9.3f}"
        lines.append(f"{turn.player:<12}{figures}  {evaluations}")
    return lines


def described(peak: Peak, devices: int, strategy: Strategy) -> str:
    """The peak in words."""
    where = f" on each of {devices} devices ({strategy})" if devices > 1 else ""
    moment = f", {peak.turn}: {peak.phase}" if peak.turn else " of states alone"
    return f"peak {peak.size / GIB:.2f} GiB{where}{moment}"
