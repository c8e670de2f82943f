"""The layouts, models and variants that test_layouts.py runs."""

from __future__ import annotations

from typing import Any, NamedTuple

ROW = 24  # tokens a row: about two trajectories

DENSE = ["llama-tied", "llama", "qwen2-tied", "qwen3"]
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": dict(family="llama", tied=True),
    "llama": dict(family="llama", tied=False),
    "llama-scaled": dict(family="llama", tied=False, rope_scaling=True),
    "qwen2-tied": dict(family="qwen2", tied=True),
    "qwen2": dict(family="qwen2", tied=False),
    "qwen3-tied": dict(family="qwen3", tied=True),
    "qwen3": dict(family="qwen3", tied=False),
    "qwen3_moe": dict(family="qwen3_moe", tied=False),
    "qwen3_moe-tied": dict(family="qwen3_moe", tied=True),
    "qwen3_moe-not-renormalised": dict(family="qwen3_moe", tied=False, norm_topk_prob=False),
    "llama-tied-5-layers": dict(family="llama", tied=True, num_hidden_layers=5),
    "llama-tied-8-layers": dict(family="llama", tied=True, num_hidden_layers=8),
}
MODELS |= {f"{name}-4-groups": {**MODELS[name], "num_key_value_heads": 4} for name in ("llama-tied", "qwen3_moe")}
ALL = [*DENSE, "qwen3_moe"]
REST = ["llama-scaled", "qwen2", "qwen3-tied", "qwen3_moe-tied", "qwen3_moe-not-renormalised"]
MOE = ["qwen3_moe"]
ONE_OF_EACH = ["llama-tied", "qwen3_moe"]
ONE_OF_EACH_WITH_4_GROUPS = [f"{name}-4-groups" for name in ONE_OF_EACH]

TP2, TP4 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}
PP2, PP3, PP4 = {"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 3}, {"pipeline_parallel_size": 4}
CP2, CP3, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 3}, {"context_parallel_size": 4}
EP2, EP4 = {"expert_parallel_size": 2}, {"expert_parallel_size": 4}
VP2 = {"virtual_pipeline_size": 2}
NO_SP = {"sequence_parallel": False}
UNEVEN = {"pipeline_layers": [1, 3]}
# name -> (ranks, policy settings, models). Families differ in what tensor, pipeline, virtual and context ranks share out, so all are in
# one layout of each, and in tensor and pipeline together; in others, such as copies, they would tell no more than one of each.
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "one": (1, {}, list(MODELS)),
    "tp2": (2, TP2 | NO_SP, DENSE),
    "tp2+sp": (2, TP2, ALL),
    "pp2": (2, PP2, ALL),
    "pp2 uneven": (2, PP2 | UNEVEN, ONE_OF_EACH),
    "pp2 vp2": (2, PP2 | VP2, ALL + REST),
    "pp2 vp2 uneven": (2, PP2 | VP2, ["llama-tied-5-layers"]),
    "cp2": (2, CP2, ALL + REST),
    "dp2": (2, {}, ONE_OF_EACH),
    "ep2": (2, EP2, MOE),
    "ep2 tp2+sp on 2": (2, EP2 | TP2, MOE),
    "ep2 cp2 on 2": (2, EP2 | CP2, MOE),
    "pp3": (3, PP3, ONE_OF_EACH),
    "cp3": (3, CP3, ONE_OF_EACH),
    "dp3": (3, {}, ONE_OF_EACH),
    "tp4": (4, TP4 | NO_SP, ONE_OF_EACH_WITH_4_GROUPS[:1]),
    "tp4+sp": (4, TP4, ONE_OF_EACH_WITH_4_GROUPS),
    "pp4": (4, PP4, ONE_OF_EACH),
    "pp4 uneven": (4, PP4, ["llama-tied-5-layers"]),
    "pp4 vp2": (4, PP4 | VP2, ["llama-tied-8-layers"]),
    "cp4": (4, CP4, ONE_OF_EACH),
    "dp4": (4, {}, ONE_OF_EACH),
    "tp2 pp2": (4, TP2 | PP2 | NO_SP, DENSE[:1]),
    "tp2 pp2 vp2": (4, TP2 | PP2 | VP2 | NO_SP, DENSE[:1]),
    "tp2 cp2": (4, TP2 | CP2 | NO_SP, DENSE[:1]),
    "tp2 dp2": (4, TP2 | NO_SP, DENSE[:1]),
    "tp2+sp pp2": (4, TP2 | PP2, ALL + REST),
    "tp2+sp pp2 uneven": (4, TP2 | PP2 | UNEVEN, ONE_OF_EACH),
    "tp2+sp pp2 vp2": (4, TP2 | PP2 | VP2, ONE_OF_EACH),
    "tp2+sp cp2": (4, TP2 | CP2, ONE_OF_EACH),
    "tp2+sp dp2": (4, TP2, ONE_OF_EACH),
    "pp2 cp2": (4, PP2 | CP2, ONE_OF_EACH),
    "pp2 cp2 uneven": (4, PP2 | CP2 | UNEVEN, ONE_OF_EACH),
    "pp2 dp2": (4, PP2, ONE_OF_EACH),
    "pp2 dp2 uneven": (4, PP2 | UNEVEN, ONE_OF_EACH),
    "pp2 vp2 cp2": (4, PP2 | VP2 | CP2, ONE_OF_EACH),
    "pp2 vp2 dp2": (4, PP2 | VP2, ONE_OF_EACH),
    "cp2 dp2": (4, CP2, ONE_OF_EACH),
    "ep4": (4, EP4, MOE),
    "ep2 dp4": (4, EP2, MOE),
    "ep2 pp2": (4, EP2 | PP2, [*MOE, "qwen3_moe-tied", "qwen3_moe-not-renormalised"]),
    "ep2 tp2+sp": (4, EP2 | TP2, MOE),
    "ep4 tp2+sp": (4, EP4 | TP2, MOE),
    "ep2 tp4+sp": (4, EP2 | TP4, ["qwen3_moe-4-groups"]),
    "ep4 tp4+sp": (4, EP4 | TP4, ["qwen3_moe-4-groups"]),
    "ep2 cp2": (4, EP2 | CP2, MOE),
    "ep4 cp2": (4, EP4 | CP2, MOE),
    "ep2 cp4": (4, EP2 | CP4, MOE),
    "ep4 cp4": (4, EP4 | CP4, MOE),
    "ep4 tp2+sp cp2": (4, EP4 | TP2 | CP2, MOE),
    "ep2 tp2+sp pp2": (4, EP2 | TP2 | PP2, MOE),
    "ep2 tp2+sp pp2 vp2": (4, EP2 | TP2 | PP2 | VP2, MOE),
    "ep2 pp2 cp2": (4, EP2 | PP2 | CP2, MOE),
    "ep2 pp2 vp2": (4, EP2 | PP2 | VP2, MOE),
    "ep2 pp2 vp2 cp2": (4, EP2 | PP2 | VP2 | CP2, MOE),
}

# name -> settings by room
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "": {},
    "longer rows": {"policy": {"tokens_per_microbatch": 50}},
    "one row": {"policy": {"tokens_per_microbatch": 4096}},
    "unshared": {"policy": {"shared_prefix": False}},
    "sequence lengths": {"policy": {"shared_prefix": False, "tokens_per_microbatch": 50}},
    "full recompute": {"policy": {"recompute": "full"}},
    "recomputed attention": {"policy": {"recompute": "selective"}},
    "every switch": {
        "train": {"optimizer_steps": 2},
        "policy": {
            "importance_cap": 1.5, "clip_ratio": 0.05, "dual_clip": 1.1, "entropy_bonus": 0.02, "kl_coefficient": 0.1,
            "role_weights": {"challenger": 0.5},
        },
    },
}  # fmt: skip
RECOMPUTED = {"one", "tp2+sp pp2", "pp2 cp2"}
"""Where layers are computed twice: alone, with collectives inside of layers, and with those between stages and along rows."""
OF_EACH_KIND = {"one", "tp2+sp", "pp2", "pp2 vp2", "cp2", "dp2", "tp2+sp pp2", "tp2+sp cp2", "pp2 cp2"}
COMBINED = ["ep2", "tp2+sp pp2 vp2", "pp2 vp2 cp2", "pp2 vp2 dp2", "cp2 dp2", "ep2 pp2", "ep4 tp2+sp", "ep2 tp2+sp pp2"]
TRAINED = {*ONE_OF_EACH, *ONE_OF_EACH_WITH_4_GROUPS}
"""Models that are trained in every layout; the others are in one of each kind."""


class Case(NamedTuple):
    layout: str
    model: str
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, self))


CASES = [Case(layout, model) for layout, (_, _, models) in LAYOUTS.items() for model in models]
TRAINED_CASES = [
    case for case in CASES
    if case.model in TRAINED or case.layout in OF_EACH_KIND or not TRAINED.intersection(LAYOUTS[case.layout][2])
]  # fmt: skip
VARIANT_CASES = [
    *(Case(layout, "llama-tied", variant) for layout in LAYOUTS for variant in VARIANTS
      if layout in (RECOMPUTED if "recompute" in variant else OF_EACH_KIND) and variant not in ("", "every switch")),
    *(Case("one", model, "unshared") for model in ALL[1:] + REST),
    *(Case("ep2 pp2", "qwen3_moe", variant) for variant in ("unshared", "full recompute")),
    *(Case(layout, LAYOUTS[layout][2][0], "every switch") for layout in [*sorted(OF_EACH_KIND), *COMBINED]),
    Case("one", "qwen3_moe", "every switch"),
]  # fmt: skip
