"""What a plan means, in sentences with numbers: what binds, what a layer sends, what doubling does, why the runner-up lost.

``why`` gives the formula of one predicted number with its terms. ``sentences`` answers the questions that people ask before
they rent a cluster. Every figure comes from the formulas of cost.py, rank_memory.py and closed_forms.py.
"""

from dataclasses import replace

from longspan.planner.closed_forms import megatron_elements, ulysses_elements
from longspan.planner.cost import (
    StepTime,
    layer_time,
    loss_products,
    stage_layers,
    stage_parameters,
    step_time,
    ulysses_bytes,
    ulysses_exposed,
    vocabulary_exchange_time,
)
from longspan.planner.rank_memory import RankMemory, fullest_stage, logits_bytes, rank_memory, saved_bytes
from longspan.planner.search import TIE
from longspan.planner.setting import Setting, rank_tokens
from longspan.planner.strategy import AXES, Strategy, micro_batches
from longspan.planner.uncertainty import memory_bound, memory_error, time_error
from longspan.planner.units import duration, gib, mib

TERA = 1e12


def why(x: Setting, s: Strategy, name: str) -> str:
    """The formula of one number of a plan, with its terms, as text.

    Args:
        x: model, cluster, software and step.
        s: the strategy that was priced.
        name: a field of ``StepTime`` or ``RankMemory``, or "seconds" or "bytes" for their totals.

    Returns:
        "name = formula = value".

    Raises:
        KeyError: there is no such number; the message lists them.
    """
    time, memory = step_time(x, s), rank_memory(x, s)
    if name == "seconds":
        return f"seconds = {' + '.join(f'{n} {duration(v)}' for n, v in parts(time))} = {duration(float(time.total))}"
    if name == "bytes":
        held = ("parameters", "gradients", "optimizer", "gathered", "saved", "reserve")
        terms = " + ".join(f"{n} {gib(float(getattr(memory, n)))}" for n in held)
        larger = f"max(working {gib(float(memory.working))}, logits {gib(float(memory.logits))})"
        return f"bytes = {terms} + {larger} = {gib(float(memory.total))}"
    formula = _formulas(x, s).get(name)
    if formula is None:
        raise KeyError(f"{name!r} is no number of a plan; there are seconds, bytes, {', '.join(_formulas(x, s))}")
    of_memory = getattr(memory, name.removesuffix("_bytes"), None)
    in_seconds = name in time.__dataclass_fields__
    return f"{name} = {formula} = {duration(float(getattr(time, name))) if in_seconds else gib(float(of_memory or 0.0))}"


def _formulas(x: Setting, s: Strategy) -> dict[str, str]:
    """{name of a number: its formula with the terms of the strategy ``s`` in the setting ``x``, as text}."""
    shape, recipe, device, c = x.shape, x.recipe, x.cluster.accelerator, x.constants
    count, layers, layer = micro_batches(x.workload, s), int(stage_layers(shape, s)), layer_time(x, s)
    m = float(rank_tokens(x.workload, s))
    each = f"{count} micro-batches x {layers} layers x"
    updated, shards = float(stage_parameters(shape, s)), s.data * s.ring * s.ulysses
    held, stage, flight = (float(number) for number in fullest_stage(x, s))
    cut = {stage: f" / {shards}" if s.zero >= stage and shards > 1 else "" for stage in (1, 2, 3)}
    rate = f"{x.matmul_rate / TERA:.0f} TFLOP/s ({c.matmul:g} of what large products reach)"
    pairs = shape.attention_pairs(x.workload.tokens) / shape.layers

    def link(axis: str) -> str:
        return f"{each} {duration(float(getattr(layer, axis)))} that nothing hides"

    return {
        "matmul": f"{each} 3 x 2 x {m:,.0f} tokens x {shape.active_weights / shape.layers / s.tensor:,.0f} weights / {rate}",
        "attention": f"{each} 3.5 x 2 x ({shape.qk_dim} + {shape.v_dim}) x {shape.heads} heads x {pairs:,.0f} pairs x "
        f"{s.micro_batch} rows / ({s.ulysses * s.ring * s.tensor} ranks) / the rate of the {recipe.attention} kernel",
        "elementwise": f"{each} 3 x bytes read and written by norms, residuals, rotations and activations / "
        f"{device.bandwidth / TERA:.2f} TB/s",
        "dispatch": f"{each} what the host needs to start operators ({c.dispatch * 1e6:g} us each) beyond device time",
        "loss": f"{count} micro-batches x ({loss_products(x, s)} x 2 x {m:,.0f} x {shape.hidden} x {shape.vocab} / {s.tensor} "
        f"/ {rate} + logits read and written)",
        "recompute": f"{each} {duration(float(layer.recompute))} (recompute={s.recompute}, tile_tokens={s.tile_tokens})",
        "tensor": f"{link('tensor')} + {count} x {duration(float(vocabulary_exchange_time(x, s)))} of embedding and head",
        "ulysses": link("ulysses"),
        "ring": link("ring"),
        "zero": link("zero"),
        "gradients": f"{updated:,.0f} parameters of a rank over {shards} ranks, less the backward that hides it",
        "pipeline": f"2 sends x ({count} micro-batches x {s.stages_per_rank} stages + {s.pipeline - 1})",
        "bubble": f"({s.pipeline} - 1) / {s.stages_per_rank} x a micro-batch of a stage",
        "offload": f"{count} micro-batches x 2 x (what is saved / {x.cluster.to_host.bandwidth / 1e9:.0f} GB/s - the compute "
        f"beside it)",
        "optimizer": f"{updated:,.0f}{cut[1]} parameters x bytes of their states, or {c.host_update:g} s each on the host",
        "parameters": f"{held:,.0f} x {recipe.parameter_bytes} bytes{cut[3]}",
        "gradients_bytes": f"{held:,.0f} x {recipe.gradient_bytes} bytes{cut[2]}",
        "optimizer_bytes": f"{held:,.0f} x {recipe.optimizer_bytes} bytes{cut[1]}",
        "gathered": "two layers and the head, whole, with zero=3",
        "saved": f"{stage:.0f} layers x {flight:g} micro-batches in flight x {gib(float(saved_bytes(x, s)))}",
        "working": "what one layer's backward computes again, and its gradients",
        "logits": f"{m:,.0f} x {shape.vocab} / {s.tensor} x {recipe.logit_bytes} bytes, or a tile: "
        f"{gib(float(logits_bytes(x, s)))}",
        "reserve": "context, buffers of collectives, fragmentation: a constant",
        "host": "what is offloaded, of all ranks of a node",
    }


def parts(time: StepTime) -> list[tuple[str, float]]:
    """The parts of a step that are not zero, (name, seconds), the largest first."""
    values = [(name, float(getattr(time, name))) for name in time.__dataclass_fields__]
    return sorted(((n, v) for n, v in values if v > 0), key=lambda part: -part[1])


def part_name(name: str, *strategies: Strategy) -> str:
    """The name of a part of a step in the plans of ``strategies``: what is computed again may be feed-forward tiles alone."""
    tiles_alone = [s.recompute == "none" and s.tile_tokens > 0 for s in strategies]
    if name != "recompute" or not any(tiles_alone):
        return name
    return "tiles again" if all(tiles_alone) else "recompute, tiles again"


def remarks(x: Setting, s: Strategy) -> list[str]:
    """Sentences about what a user should change or know before reading the numbers of the strategy ``s``; often none."""
    found, count = [], micro_batches(x.workload, s)
    if count * s.stages_per_rank < s.pipeline:
        found.append(
            f"With {count} micro-batch{'es' * (count > 1)} a replica, {s.pipeline - count} of {s.pipeline} pipeline stages "
            f"wait at any time; use more rows a step, at least {s.data * s.pipeline * s.micro_batch}."
        )
    if x.shape.assumed:
        feed, head = ("gated" if x.shape.gated else "plain"), ("tied" if x.shape.tied else "its own")
        found.append(
            f"The model_type of {x.shape.name} is not known here: assumed are {feed} feed-forwards, {x.shape.norms} norms a "
            f"layer, causal attention, and a head that is {head}."
        )
    return found


def kinds(memory: RankMemory) -> list[tuple[str, float]]:
    """The kinds of memory on the device, (name, bytes), the largest first."""
    values = [(name, float(getattr(memory, name))) for name in memory.__dataclass_fields__ if name != "host"]
    return sorted(((n, v) for n, v in values if v > 0), key=lambda kind: -kind[1])


def sentences(x: Setting, s: Strategy) -> list[str]:
    """Sentences, each with its numbers: which part of the step takes longest, and what would change the strategy ``s``."""
    time, memory = step_time(x, s), rank_memory(x, s)
    total, device = float(time.total), x.cluster.accelerator
    spent, held = [(part_name(n, s), value) for n, value in parts(time)], kinds(memory)
    error, source = time_error(s)
    of_memory, memory_source = memory_error(s)
    flops = x.shape.training_flops(x.workload.tokens) * x.workload.rows
    share = flops / total / x.cluster.gpus / device.peak[x.recipe.dtype]
    found = [
        f"A step takes {duration(total)} (+-{error:.0%}, {source}): {_shares(spent, total)}.",
        f"That is {share:.0%} of the peak of {device.name}, counting {flops:.3g} operations without recomputation.",
        f"The fullest rank needs {gib(float(memory.total))} of {gib(device.memory)} (+-{of_memory:.0%}, "
        f"{memory_source}); the largest part is {held[0][0]}, {gib(held[0][1])}, then {held[1][0]}, {gib(held[1][1])}.",
    ]
    if float(memory.host):
        found.append(f"A node's host needs {gib(float(memory.host))} of {gib(x.cluster.host_memory)} for what is offloaded.")
    if s.ulysses > 1:
        found += _exchange(x, s, total)
    return [*found, _doubled(x, s, total), _overtaken(x, s), _checkpoint(x)]


def _exchange(x: Setting, s: Strategy, total: float) -> list[str]:
    """Sentences about the two all-to-alls of one layer, and what Megatron sequence parallelism would send instead.

    ``total`` is the seconds of the step.
    """
    n, h, size = x.workload.tokens, x.shape.query_width, x.recipe.itemsize
    sent, seconds = float(ulysses_bytes(x, s)), float(ulysses_exposed(x, s))
    ours = float(ulysses_elements(n, h, s.ulysses * s.ring)) * size * s.micro_batch
    theirs = megatron_elements(n, x.shape.hidden) * size * s.micro_batch
    part = float(step_time(x, s).ulysses) / total
    return [
        f"The two all-to-alls of a layer (q, k, v and the output) send 4·N·h/P elements at most: {mib(ours)} of a rank for "
        f"N={n:,}, h={h}, P={s.ulysses * s.ring}; with {x.shape.kv_heads} key/value heads and without what a rank keeps, "
        f"{mib(sent)} in {duration(seconds)} a pass, {part:.1%} of the step.",
        f"Megatron sequence parallelism would send 4·N·h = {mib(theirs)} a layer and pass whatever the number of ranks, "
        f"{theirs / max(sent, 1):.0f} times as much.",
    ]


def _doubled(x: Setting, s: Strategy, total: float) -> str:
    """A sentence: how the time changes when the tokens and the ranks of a sequence double together. ``total``: seconds of
    the step."""
    bigger = replace(x, workload=replace(x.workload, tokens=2 * x.workload.tokens),
                     cluster=replace(x.cluster, gpus=2 * x.cluster.gpus))  # fmt: skip
    by_heads = 2 * s.ulysses * s.tensor <= x.shape.heads
    wider = replace(s, ulysses=2 * s.ulysses) if by_heads else replace(s, ring=2 * s.ring)
    axis = f"ulysses={wider.ulysses}" if by_heads else f"ring={wider.ring}"
    time, memory = float(step_time(bigger, wider).total), float(rank_memory(bigger, wider).total)
    if s.ulysses == 1 or not by_heads:
        sent = ""
    else:
        before, after = (float(ulysses_bytes(*pair)) for pair in ((x, s), (bigger, wider)))
        sent = f"; the all-to-alls of a layer send {mib(after)} instead of {mib(before)} a rank"
    return (
        f"With twice the tokens and twice the GPUs ({axis}) a step takes {duration(time)} instead of {duration(total)}, "
        f"because attention grows with the square of the tokens, and a rank needs {gib(memory)}{sent}."
    )


def _overtaken(x: Setting, s: Strategy) -> str:
    """A sentence: from which number of tokens on a ring of as many ranks as Ulysses has would expose less communication."""
    degree = max(2, s.ulysses * s.ring)
    if degree * s.tensor > x.shape.heads:
        return (
            f"{degree} ranks a sequence exceed the {x.shape.heads} query heads (tensor={s.tensor}): Ulysses goes up to "
            f"{x.shape.heads // s.tensor} ranks, and ring takes the rest."
        )
    for power in range(10, 27):
        longer = replace(x, workload=replace(x.workload, tokens=1 << power))
        ring = layer_time(longer, replace(s, ulysses=1, ring=degree, head_chunks=1)).ring
        ulysses = layer_time(longer, replace(s, ulysses=degree, ring=1, head_chunks=1)).ulysses
        if float(ring) < float(ulysses):
            return (
                f"With {degree} ranks a sequence, ring exposes less communication than Ulysses from about {1 << power:,} "
                f"tokens on, where its hops are hidden behind attention."
            )
    return f"With {degree} ranks a sequence, Ulysses exposes less communication than ring at every length up to 64M tokens."


def _checkpoint(x: Setting) -> str:
    """A sentence: how large a checkpoint is."""
    size = x.shape.parameters * (x.recipe.parameter_bytes + x.recipe.optimizer_bytes)
    return f"A checkpoint holds {gib(size)}: parameters and optimizer states of {x.shape.parameters:,} parameters."


def lost(x: Setting, best: Strategy, other: Strategy) -> str:
    """A sentence: why ``other`` is slower than ``best``, by the part of the step that differs most; or what decided a tie."""
    one, two = step_time(x, best), step_time(x, other)
    if float(two.total) <= (1 + TIE) * float(one.total):
        mine, its = (float(rank_memory(x, s).total) for s in (best, other))
        axes = [sum(getattr(s, axis) > 1 for axis in AXES) for s in (best, other)]
        if mine * memory_bound(best) < its * (2 - memory_bound(other)):
            reason = f"the best needs less memory, {gib(mine)} instead of {gib(its)}"
        else:
            reason = "the best has fewer axes" if axes[1] > axes[0] else "either may be the faster one"
        return (
            f"{other} takes {duration(float(two.total))} and the best {duration(float(one.total))}, which is a tie (within "
            f"{TIE:.0%}): {reason}"
        )
    gap = {name: float(getattr(two, name)) - float(getattr(one, name)) for name in one.__dataclass_fields__}
    name = max(gap, key=lambda part: gap[part])
    return (
        f"{other} takes {duration(float(two.total))} instead of {duration(float(one.total))}: most of the difference is "
        f"{part_name(name, other)}, {duration(float(getattr(two, name)))} instead of {duration(float(getattr(one, name)))}"
    )


def _shares(spent: list[tuple[str, float]], total: float) -> str:
    """Parts and their shares of ``total`` as text, "matmul 60%, attention 30%"; those below half a percent are left out."""
    return ", ".join(f"{name} {value / total:.0%}" for name, value in spent if value > 0.005 * total)
