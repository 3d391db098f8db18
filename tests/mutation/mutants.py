"""The deliberate faults, and the short tests that notice each. `docs/exactness.md` lists them for people."""

from __future__ import annotations

from .mutant import Mutant

PREFIX_CACHE = "tests/engine/test_prefix_cache.py"
EXACTNESS = "tests/engine/test_exactness.py::test_mixed_batch[demo-v1-eager]"
CANARY = "tests/differential/test_canary.py"
PREEMPTION_V2 = "tests/differential/test_preemption.py::test_resumed_requests_keep_their_interventions[v2]"

RELEASED_EARLY = """    scheduler._free_request = free_and_release
    update_from_output = scheduler.update_from_output

    def update_and_release(self: Any, *args: Any) -> Any:
        result = update_from_output(self, *args)
        for request in self.running:
            plan = plan_of(request.sampling_params)
            if plan and request.num_output_tokens == request.max_tokens - 1:
                self.steering.release(plan)
        return result

    scheduler.update_from_output = update_and_release
"""

RESOLVED_AGAIN = """        from dataclasses import replace

        plan = plan_of(new_req_data.sampling_params)
        grown = len(new_req_data.prefill_token_ids or ()) - new_req_data.prompt_len
        if plan and grown > 0:
            plan = replace(plan, placements=tuple({change} for p in plan.placements))
        steering.add(new_req_data.req_id, plan)
"""

LENGTH_FROM_PREFILL = RESOLVED_AGAIN.format(change="p._replace(start=p.start and p.start + grown)")
SCALE_DROPPED = RESOLVED_AGAIN.format(change="p._replace(scale=1.0)")

MUTANTS = (
    Mutant(
        "no-cache-key",
        "Blocks carry no key of their edits",
        "steer_vllm/engine/cache_keys.py",
        'return keys if key is None else [*keys, ("steer_vllm", key)]',
        "return keys",
        (PREFIX_CACHE,),
    ),
    Mutant(
        "key-without-clipping",
        "Keys hold whole segments instead of their part in the block",
        "steer_vllm/segments.py",
        "(max(segment.start, start), min(segment.stop, stop), segment.terms)",
        "(segment.start, segment.stop, segment.terms)",
        (PREFIX_CACHE, "tests/core/test_segments.py"),
    ),
    Mutant(
        "key-by-name",
        "Keys say that there is an edit, not which content it has",
        "steer_vllm/segments.py",
        'digest.update(f"{term.digest}#{term.part}*{term.scale.hex()};".encode())',
        'digest.update(f"#{term.part}*{term.scale.hex()};".encode())',
        (PREFIX_CACHE, "tests/core/test_segments.py"),
    ),
    Mutant(
        "length-from-prefill",
        "A resumed request's prompt length is taken from its prefill",
        "steer_vllm/engine/runner_v2.py",
        "        steering.add(new_req_data.req_id, plan_of(new_req_data.sampling_params))\n",
        LENGTH_FROM_PREFILL,
        (PREEMPTION_V2,),
    ),
    Mutant(
        "scale-dropped-on-resume",
        "A resumed request gets its interventions at scale 1",
        "steer_vllm/engine/runner_v2.py",
        "        steering.add(new_req_data.req_id, plan_of(new_req_data.sampling_params))\n",
        SCALE_DROPPED,
        (PREEMPTION_V2,),
    ),
    Mutant(
        "released-early",
        "A request's rows are freed one step before its last",
        "steer_vllm/engine/lifetimes.py",
        "    scheduler._free_request = free_and_release\n",
        RELEASED_EARLY,
        (CANARY,),
    ),
    Mutant(
        "segment-off-by-one",
        "The response starts one token late",
        "steer_vllm/positions.py",
        "spans = [Span(n - 1, OPEN, 0)]",
        "spans = [Span(n, OPEN, 0)]",
        ("tests/core/test_positions.py",),
    ),
    Mutant(
        "row-not-refilled",
        "A row that a finished request used keeps its content for the next one",
        "steer_vllm/slots.py",
        "if self._additive_held.get(fill.row) != fill.content:",
        "if fill.row not in self._additive_held:",
        (CANARY, "tests/core/test_slots.py"),
    ),
    Mutant(
        "slots-settled-early",
        "A prefill's token slots stay when its batch goes on to decode",
        "steer_vllm/engine/worker.py",
        "self._settled = view.decoding",
        "self._settled = True",
        ("tests/engine_units/test_worker.py",),
    ),
    Mutant(
        "heads-not-sliced",
        "Every rank of a tensor-parallel group takes the first rank's heads",
        "steer_vllm/engine/projection.py",
        "mine = heads[rank * width : (rank + 1) * width]",
        "mine = heads[:width]",
        ("tests/engine_units/test_projection.py",),
    ),
    Mutant(
        "heads-sliced-twice",
        "Ranks of a tensor-parallel group take a slice of their slice",
        "steer_vllm/engine/projection.py",
        "mine = heads[rank * width : (rank + 1) * width]",
        "mine = heads[rank * width : (rank + 1) * width]\n"
        "        mine = mine * (torch.arange(width) // (width // self.base.tp_size) == rank)",
        ("tests/engine_units/test_projection.py",),
    ),
    Mutant(
        "freed-while-waiting",
        "Content is freed while a request that uses it waits",
        "steer_vllm/engine/admission.py",
        "self._users.update(digests)",
        "self._users.update(())",
        ("tests/engine_units/test_admission.py",),
    ),
    Mutant(
        "batch-axis-as-token",
        "A batch axis of 1 before the tokens passes for the number of tokens",
        "steer_vllm/engine/wrapping.py",
        "tokens = y.shape[-2]",
        "tokens = y.shape[0]",
        ("tests/engine_units/test_layers.py",),
    ),
    Mutant(
        "component-lost",
        "A composition loses its last component",
        "steer_vllm/packed.py",
        "    terms = tuple(terms)\n    offsets",
        "    terms = tuple(terms)[:1]\n    offsets",
        ("tests/core/test_packed.py",),
    ),
    Mutant(
        "half-precision-tables",
        "Tables are bfloat16 beside a float32 model",
        "steer_vllm/engine/worker.py",
        "self.tables = SlotTables(self.layout, config, self.dtype, device)",
        "self.tables = SlotTables(self.layout, config, torch.bfloat16, device)",
        (EXACTNESS,),
    ),
)
