"""How the ranks are divided: one object that owns the parallel degrees and judges them, in plain Python.

A rank belongs to one group of each kind. Ranks that differ only in `tensor` hold slices of the same layers, in `pipeline`
other layers, in `context` other tokens of the same row, in `data` other rows. `expert` is not a degree of its own: the
ranks of one pipeline stage (tensor x context x data of them) are divided into groups that share the experts among them.

With virtual pipelining a stage holds several chunks of layers: the model's chunks 0, 1, 2, ... are dealt to the stages in
turn, so stage r has chunks r, r + pipeline, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_spice.config.errors import ConfigError
from megatron_spice.config.hf import ModelArchitecture
from megatron_spice.config.schema import PolicyConfig


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Parallel degrees. `chunk_layers` has the number of layers of each chunk, in the model's order."""

    chunk_layers: tuple[int, ...]
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, config: PolicyConfig, architecture: ModelArchitecture, world_size: int) -> ParallelLayout:
        """The layout of a recipe's policy on `world_size` ranks.

        Raises:
            ConfigError: the degrees fit neither the ranks nor the model; the message says which number divides not what.
        """
        problems = layout_problems(config, architecture, world_size)
        if problems:
            raise ConfigError(problems)
        chunks = config.pipeline_parallel_size * config.virtual_pipeline_size
        return cls(
            chunk_layers=tuple(config.pipeline_layers or spread_layers(architecture.num_layers, chunks)),
            tensor=config.tensor_parallel_size,
            pipeline=config.pipeline_parallel_size,
            context=config.context_parallel_size,
            expert=config.expert_parallel_size,
            data=world_size // _model_ranks(config),
            sequence_parallel=config.sequence_parallel and config.tensor_parallel_size > 1,
        )

    @property
    def virtual(self) -> int:
        """Chunks of layers on each pipeline stage."""
        return len(self.chunk_layers) // self.pipeline

    @property
    def num_layers(self) -> int:
        return sum(self.chunk_layers)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def row_multiple(self) -> int:
        """A row's length must be a multiple of this: context ranks take two equal pieces each (an early and a late one,
        which see few and many tokens), and sequence parallelism divides what a rank has over its tensor group."""
        pieces = 2 * self.context if self.context > 1 else 1
        return pieces * (self.tensor if self.sequence_parallel else 1)

    @property
    def equal_rows(self) -> bool:
        """All rows of a step must be equally long: interleaved stages exchange tensors of a shape agreed on before."""
        return self.virtual > 1

    def layers_of(self, chunk: int) -> range:
        """Global numbers of the layers of chunk `chunk` of the model."""
        start = sum(self.chunk_layers[:chunk])
        return range(start, start + self.chunk_layers[chunk])

    def chunk_of(self, layer: int) -> int:
        """The model's chunk that holds global layer `layer`."""
        return next(chunk for chunk in range(len(self.chunk_layers)) if layer in self.layers_of(chunk))

    def describe(self) -> str:
        """For people: `TP=2+SP PP=4 (layers 5 6 6 5) CP=2 DP=8`."""
        parts = [f"TP={self.tensor}{'+SP' if self.sequence_parallel else ''}", f"PP={self.pipeline}"]
        if self.virtual > 1:
            parts[-1] += f" VP={self.virtual}"
        if len(set(self.chunk_layers)) > 1:
            parts[-1] += f" (layers {' '.join(map(str, self.chunk_layers))})"
        if self.context > 1:
            parts.append(f"CP={self.context}")
        if self.expert > 1:
            parts.append(f"EP={self.expert}")
        return " ".join([*parts, f"DP={self.data}"])


def spread_layers(num_layers: int, chunks: int) -> list[int]:
    """Layers as evenly as can be; what is left over goes to the middle, because the first chunk has the embedding and the
    last one the output matrix besides. `spread_layers(30, 4) == [7, 8, 8, 7]`."""
    counts = [num_layers // chunks] * chunks
    for chunk in sorted(range(chunks), key=lambda chunk: (abs(2 * chunk - (chunks - 1)), chunk))[: num_layers % chunks]:
        counts[chunk] += 1
    return counts


def layout_problems(config: PolicyConfig, architecture: ModelArchitecture, world_size: int) -> list[str]:
    """Everything that keeps the policy's degrees from fitting the ranks and the model; empty if they fit."""
    return [
        *rank_problems(config, world_size),
        *tensor_problems("policy.tensor_parallel_size", config.tensor_parallel_size, architecture),
        *_pipeline_problems(config, architecture),
        *_expert_problems(config, architecture, world_size),
        *_fp8_problems(config, architecture),
        *_recompute_problems(config, architecture),
    ]


def _model_ranks(config: PolicyConfig) -> int:
    return config.tensor_parallel_size * config.pipeline_parallel_size * config.context_parallel_size


def rank_problems(config: PolicyConfig, world_size: int, ranks: str | None = None) -> list[str]:
    """The ranks against tensor x pipeline x context; `ranks` says in words where they come from."""
    shard = _model_ranks(config)
    if world_size % shard == 0:
        return []
    product = (
        f"policy.tensor_parallel_size={config.tensor_parallel_size} x policy.pipeline_parallel_size="
        f"{config.pipeline_parallel_size}"
    )
    if config.context_parallel_size > 1:
        product += f" x policy.context_parallel_size={config.context_parallel_size}"
    return [
        f"{product} = {shard} does not divide the {ranks or f'{world_size} ranks'}; make their product one of "
        f"{divisors(world_size)}, or change the ranks"
    ]


def tensor_problems(key: str, size: int, architecture: ModelArchitecture) -> list[str]:
    """Numbers of the model that are split over `size` tensor-parallel ranks (`key`: the setting that says so)."""
    numbers = {
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
    }
    if architecture.num_experts is None:  # experts are not split over the tensor group
        numbers["intermediate_size"] = architecture.ffn_hidden_size
    fits = [n for n in divisors(architecture.num_query_groups) if not any(number % n for number in numbers.values())]
    return [
        f"{key}={size} does not divide the model's {name}={number}; choose one of {fits}"
        for name, number in numbers.items()
        if number % size
    ][:1]


def _pipeline_problems(config: PolicyConfig, architecture: ModelArchitecture) -> list[str]:
    layers, stages, virtual = architecture.num_layers, config.pipeline_parallel_size, config.virtual_pipeline_size
    chunks = stages * virtual
    degrees = f"policy.pipeline_parallel_size={stages} x policy.virtual_pipeline_size={virtual} = {chunks}"
    if virtual > 1 and stages == 1:
        return [f"policy.virtual_pipeline_size={virtual} needs 2 or more stages; raise policy.pipeline_parallel_size, or give 1"]
    if config.pipeline_layers is not None:
        given = config.pipeline_layers
        if len(given) != chunks:
            return [f"policy.pipeline_layers={given} has {len(given)} numbers, {degrees} chunks need {chunks}; give one for each"]
        if sum(given) != layers:
            return [
                f"policy.pipeline_layers={given} adds up to {sum(given)}, not to the model's num_hidden_layers={layers}; "
                "change one, or leave them out"
            ]
    elif chunks > layers:
        return [f"{degrees} chunks are more than the model's num_hidden_layers={layers}; lower one of them"]
    return []


def _expert_problems(config: PolicyConfig, architecture: ModelArchitecture, world_size: int) -> list[str]:
    size, experts = config.expert_parallel_size, architecture.num_experts
    if experts is None:
        if size > 1:
            return [f"policy.expert_parallel_size={size}, but the model ({architecture.family}) has no experts; give 1"]
        return []
    problems = []
    if experts % size:
        problems.append(
            f"policy.expert_parallel_size={size} does not divide the model's num_experts={experts}; choose one of "
            f"{divisors(experts)}"
        )
    stage = world_size // config.pipeline_parallel_size
    if stage % size:
        problems.append(
            f"policy.expert_parallel_size={size} does not divide the {stage} ranks of a pipeline stage ({world_size} ranks / "
            f"policy.pipeline_parallel_size={config.pipeline_parallel_size}); choose one of {divisors(stage)}"
        )
    if config.tensor_parallel_size > 1 and not config.sequence_parallel:
        problems.append(
            f"a mixture of experts with policy.tensor_parallel_size={config.tensor_parallel_size} needs "
            "policy.sequence_parallel=true: its tensor-parallel ranks route different tokens"
        )
    return problems


def _fp8_problems(config: PolicyConfig, architecture: ModelArchitecture) -> list[str]:
    if config.precision != "fp8":
        return []
    fp8, problems = config.fp8, []
    kept = fp8.first_layers_bf16 + fp8.last_layers_bf16
    if kept >= architecture.num_layers:
        problems.append(
            f"policy.fp8.first_layers_bf16={fp8.first_layers_bf16} + last_layers_bf16={fp8.last_layers_bf16} leave none of the "
            f"model's num_hidden_layers={architecture.num_layers} in FP8; lower them, or give policy.precision=bf16"
        )
    a_stage = architecture.num_layers // config.pipeline_parallel_size
    for key, count in (("first_layers_bf16", fp8.first_layers_bf16), ("last_layers_bf16", fp8.last_layers_bf16)):
        if count > a_stage:  # Megatron's rule
            problems.append(
                f"policy.fp8.{key}={count} is more than a stage's {a_stage} layers (num_hidden_layers="
                f"{architecture.num_layers} / policy.pipeline_parallel_size={config.pipeline_parallel_size}); lower it"
            )
    if kept and fp8.recipe == "delayed":
        problems.append(
            "policy.fp8.recipe=delayed scales all layers together and cannot leave some in bf16; give first_layers_bf16=0 and "
            "last_layers_bf16=0, or recipe=blockwise"
        )
    return problems


def _recompute_problems(config: PolicyConfig, architecture: ModelArchitecture) -> list[str]:
    """Modules that Megatron would silently not recompute, or could not."""
    if config.recompute != "selective":
        return []
    dense = architecture.num_experts is None
    problems = []
    for module in config.recompute_modules:
        if (module == "moe" and dense) or (module == "mlp" and not dense):
            other = "mlp" if dense else "moe"
            problems.append(f"policy.recompute_modules={module} is not in a {architecture.family} model; give {other} instead")
        if module == "layernorm" and dense:
            problems.append("policy.recompute_modules=layernorm is for mixtures of experts: a dense layer's norms are fused; leave it out")
    if "layernorm" in config.recompute_modules and config.precision == "fp8" and config.fp8.recipe == "delayed":
        problems.append("policy.recompute_modules=layernorm does not go with policy.fp8.recipe=delayed; leave one of them out")
    return problems


def divisors(number: int) -> list[int]:
    """All positive divisors, rising."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
