"""Every setting of a run, documented where it stands. One class a room; `Config` is the tree that a recipe fills.

Values that can be judged alone are judged here; what needs two rooms (a layout against the number of ranks, a prompt
against the context length) is in `checks.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Weights = Annotated[dict[str, PositiveFloat], Field(min_length=1)]
Precision = Literal["fp32", "bf16", "fp8"]
AnswerType = Literal["MCQ", "Integer", "Expression", "String"]
ChallengerReward = Literal["variance", "threshold", "r_zero", "r_zero_majority", "absolute_zero"]


class Room(BaseModel):
    """A group of settings; frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class RunConfig(Room):
    dir: Path = Field(description="Folder of this run: checkpoints, logs, metrics, episodes. An existing run is resumed.")


class TrainConfig(Room):
    iterations: PositiveInt = Field(640, description="T of Algorithm 1. [paper: 640]")
    passages: PositiveInt = Field(128, description="B of Algorithm 1: passages an iteration. [paper: 128]")
    optimizer_steps: PositiveInt = Field(
        1, description="Optimiser steps an iteration's trajectories are split into; above 1 the ratio is clipped."
    )
    seed: int = Field(
        0, ge=0, description="Seeds the corpus order, every choice of the game, a warm-up's order, and with rollout.seed what engines sample."
    )


class CorpusConfig(Room):
    path: Path = Field(description="Folder made by tools/preprocess_corpus.py.")
    weights: Weights | None = Field(
        None,
        description="How often passages of each source label are drawn, such as {mathematics: 0.5, general: 0.5}; labels "
        "that are not named are not drawn. Without, every passage is as probable as any other. [paper: half and half]",
    )
    loader: Literal["mmap", "dali"] = Field(
        "mmap", description="`dali` reads ahead in a process beside, for cold corpora on slow file systems; same passages."
    )


class VerifierConfig(Room):
    workers: PositiveInt = Field(1, description="Processes that run Math-Verify on each engine host.")
    timeout: PositiveFloat = Field(2.0, description="Seconds one comparison may take before its worker is killed.")
    memory_mb: PositiveInt = Field(1024, description="Address space of a worker, MiB.")
    max_chars: PositiveInt = Field(1000, description="Longer extracted answers are wrong without being parsed.")


class GameConfig(Room):
    prompt_style: Literal["chat", "few_shot"] = Field(
        "chat", description="`chat`: the paper's JSON prompts. `few_shot`: raw completion after worked examples (small models)."
    )
    answer_types: list[AnswerType] = Field(
        ["MCQ", "Integer", "Expression", "String"], min_length=1, description="Kinds of task the Challenger may be asked for."
    )
    format_selection: Literal["model", "random"] = Field(
        "model", description="Who chooses the kind of task for a passage; `few_shot` always draws it at random."
    )
    attempts: PositiveInt = Field(1024, description="N: most Challenger attempts a passage. [paper: 1024]")
    attempt_chunk: PositiveInt = Field(8, description="Attempts sampled at a time until one is valid and there are G.")
    group_size: PositiveInt = Field(8, description="G: attempts trained on a passage, and answers a task (K). [paper: 8]")
    challenger_reward: ChallengerReward = Field(
        "variance",
        description="Reward of a valid task by its pass rate; `r_zero_majority`: by how many answers agree with the most frequent one.",
    )
    invalid_reward: float = Field(-0.1, description="rho: reward of an invalid attempt. [paper: -0.1]")
    grounding: Literal["none", "span"] = Field(
        "none", description="`span`: the answer must occur in the passage and not in the question (MCQ: the chosen option's text)."
    )
    reject_references: bool = Field(False, description="Reject questions that point at the passage (`in the text`, ...).")
    reject_copies: PositiveInt | None = Field(
        None, description="Reject questions that share a run of so many words with the passage (`audit/copied_words`); null: none."
    )
    reject_giveaways: bool = Field(False, description="Reject questions in which their own answer stands.")
    reject_duplicates: bool = Field(
        False, description="Reject a question that an earlier valid attempt of the same game (one passage, played once) asked word for word."
    )
    advantage_baseline: Literal["group", "role"] = Field(
        "group", description="What is subtracted from a reward: the mean of its group, or a running mean of its role (SPIRAL)."
    )
    baseline_decay: float = Field(0.95, ge=0, lt=1, description="Of the running mean of `role`, an iteration.")
    fixed_challenger: bool = Field(
        False,
        description="Ablation: the Challenger is not trained; policy.model as it was before training writes all tasks (a second engine "
        "beside each, on a CPU), or rollout.challenger.engines do.",
    )
    no_corpus: bool = Field(False, description="Ablation: the Challenger invents a task without a passage.")
    challenger_max_tokens: PositiveInt = Field(4096, description="Longest Challenger completion.")
    reasoner_max_tokens: PositiveInt = Field(4096, description="Longest Reasoner completion.")
    selection_max_tokens: PositiveInt = Field(256, description="Longest format-selection completion.")
    verifier: VerifierConfig = VerifierConfig()


class ChallengerConfig(Room):
    """Servers whose model writes the tasks instead of the policy: the paper's Strong Challenger."""

    engines: list[str] = Field(
        [],
        description="URLs of SGLang servers that run already, with any model that generates; they are asked and never changed. Their "
        "key is given in SPICE_CHALLENGER_KEY. Needs game.fixed_challenger=true.",
    )
    tokenizer: Path | None = Field(None, description="Hugging Face folder with their model's tokenizer; None: policy.model's own.")
    prompt_style: Literal["chat", "few_shot"] | None = Field(None, description="How they are asked; None: game.prompt_style.")


class RolloutConfig(Room):
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature of both roles. [paper: 1.0]")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the probability that tokens are sampled from, for both roles; 1: all of it.")
    tensor_parallel_size: PositiveInt = Field(1, description="Ranks of one engine.")
    engines_per_node: PositiveInt = Field(1, description="Colocated engines on each node.")
    passages_in_flight: PositiveInt = Field(8, description="Passages one engine plays at a time.")
    oversample: float = Field(
        1.0,
        ge=1,
        description="Passages begun for each one wanted; an iteration ends when train.passages are over, and the others go on in "
        "the next (1: off). What they have of older weights is off-policy; policy.importance_cap corrects for it.",
    )
    max_running_requests: PositiveInt = Field(64, description="Requests an engine decodes together.")
    max_total_tokens: PositiveInt = Field(16384, description="Tokens in an engine's KV cache (CPU engines).")
    context_length: PositiveInt | None = Field(None, description="Longest prompt plus completion; None: the model's own.")
    memory_fraction: float = Field(0.6, gt=0, lt=1, description="Share of accelerator memory for weights and KV cache.")
    threads: PositiveInt | None = Field(None, description="CPU threads of an engine; None: the cores shared out.")
    bucket_mb: PositiveInt = Field(256, description="Weights travel to the engines in buckets of this size, MiB.")
    weights: Literal["auto", "fp8"] = Field(
        "auto",
        description="What engines hold. `auto`: the policy's own type (see round_weights); `fp8`: E4M3 in blocks of 128 x 128 with "
        "their factors, as an FP8 policy rounds its weights.",
    )
    round_weights: bool = Field(
        True, description="Engines of an FP8 policy get its weights rounded to FP8 and back, as its own products see them."
    )
    verify_sync: bool = Field(
        True,
        description="After each sync compare engine and policy log-probs on a fixed text; after an engine's first, its weights too.",
    )
    sync_tolerance: PositiveFloat | None = Field(
        None, description="Largest mean absolute difference verify_sync accepts; None: by precision (weights/sync.py)."
    )
    drift_alarm: PositiveFloat = Field(0.2, description="Warn when mean |engine - policy| log-prob passes this.")
    server: dict[str, bool | int | float | str] = Field(
        {},
        description="More of SGLang's own server settings for colocated engines, by their names there: `{attention_backend: "
        "triton}`.",
    )
    start_timeout: PositiveFloat = Field(300.0, description="Seconds an engine may take to come up.")
    request_timeout: PositiveFloat = Field(
        600.0,
        description="Seconds for which an engine may answer none of its requests. How long one waits behind others is not bounded.",
    )
    hang_timeout: PositiveFloat = Field(
        20.0, description="Seconds an engine may have work and use no processor time before it counts as hung."
    )
    max_restarts: int = Field(
        3, ge=0, description="Times an engine may be replaced in one iteration; after that the run is saved and ends."
    )
    seed: int = Field(0, ge=0, description="Seed of the engines' own sampling.")
    engines: list[str] = Field(
        [],
        description="URLs of SGLang servers that run already, used instead of colocated engines; their key is given in the "
        "environment variable SPICE_ENGINE_KEY. Each must be this run's alone.",
    )
    challenger: ChallengerConfig = ChallengerConfig()
    router: str | None = Field(
        None, description="URL of an sglang-router before rollout.engines: generations go through it, weights to each engine."
    )
    deterministic: bool = Field(
        False,
        description="Engines sample each completion by a seed of its own (from train.seed, iteration and passage), in SGLang's "
        "deterministic mode: a rerun samples the same. Slower; on a CPU up to rounding, which policy.precision=fp32 makes rare.",
    )


class Fp8Config(Room):
    """What `policy.precision: fp8` means; unused by the other precisions."""

    recipe: Literal["blockwise", "tensorwise", "delayed"] = Field(
        "blockwise", description="Scaling: 1x128 activations and 128x128 weights, one scale a tensor, or one from past steps."
    )
    format: Literal["e4m3", "hybrid"] = Field("e4m3", description="`hybrid`: gradients in E5M2, the rest in E4M3.")
    first_layers_bf16: int = Field(0, ge=0, description="So many layers at the start stay in bf16.")
    last_layers_bf16: int = Field(0, ge=0, description="So many layers at the end stay in bf16.")


class RoleWeightsConfig(Room):
    challenger: float = Field(1.0, ge=0, description="Factor of the Challenger's trajectories in the loss; 0: it is not trained.")
    reasoner: float = Field(1.0, ge=0, description="Factor of the Reasoner's trajectories in the loss; 0: it is not trained.")


class PolicyConfig(Room):
    model: Path = Field(description="Megatron checkpoint made by tools/convert_checkpoint.py, or a Hugging Face folder.")
    tensor_parallel_size: PositiveInt = Field(1, description="Ranks that share each matrix.")
    sequence_parallel: bool = Field(True, description="Split norms and residuals over the tensor-parallel ranks, if any.")
    pipeline_parallel_size: PositiveInt = Field(1, description="Stages that the layers are divided into, a rank or more each.")
    virtual_pipeline_size: PositiveInt = Field(1, description="Chunks of layers on each stage (interleaved schedule).")
    pipeline_layers: list[PositiveInt] | None = Field(
        None, description="Layers of each chunk in the model's order; None: as even as can be, the outer ones the fewest."
    )
    context_parallel_size: PositiveInt = Field(1, description="Ranks that share the tokens of one row.")
    expert_parallel_size: PositiveInt = Field(1, description="Ranks that share the experts of a mixture of experts.")
    precision: Precision = Field("bf16", description="bf16 and fp8 keep float32 master weights in the optimiser.")
    fp8: Fp8Config = Fp8Config()
    learning_rate: PositiveFloat = Field(1e-6, description="Constant. [paper: 1e-6]")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's; norms and biases are spared. 0: none.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradients' running mean.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the squared gradients' running mean.")
    adam_eps: PositiveFloat = Field(1e-8, description="What AdamW adds to the root that it divides by.")
    clip_grad: float = Field(1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    clip_ratio: PositiveFloat = Field(0.2, description="PPO clip of the ratio, used only with more than one optimiser step.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="Bounds the loss of a negative advantage at this multiple of it, used only with more than one optimiser step; "
        "None: off.",
    )
    entropy_bonus: float = Field(
        0.0, ge=0, description="So much of every token's entropy is added to its share of the objective; 0: off."
    )
    kl_coefficient: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Penalty for moving away from policy.model's weights (kept in host memory); 0: only measured. [paper: none]",
    )
    role_weights: RoleWeightsConfig = Field(RoleWeightsConfig(), description="Factor of each role's trajectories in the loss.")
    loss_length: PositiveInt | None = Field(
        None, description="L_max, the constant that DrGRPO divides token sums by; None: the larger of the roles' limits."
    )
    importance_cap: PositiveFloat | None = Field(
        None, description="Truncated importance sampling: cap of policy/engine probability; None: off. [Oat: 2.0]"
    )
    tokens_per_microbatch: PositiveInt = Field(8192, description="Token budget of one packed row.")
    shared_prefix: bool = Field(True, description="Compute a group's common prompt once.")
    logprob_chunk: PositiveInt = Field(1024, description="No more logits exist at a time than so many tokens have.")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="`full`: keep only layer inputs and recompute the rest; `selective`: recompute `recompute_modules`."
    )
    recompute_modules: list[Literal["core_attn", "mlp", "moe", "layernorm"]] = Field(
        ["core_attn"], min_length=1, description="What `selective` recomputes."
    )
    optimizer_offload: float = Field(0.0, ge=0, le=1, description="Share of the optimiser kept and stepped on the host.")
    sleep: Literal["auto", "gradients", "all"] = Field(
        "auto", description="What the policy gives up while engines play; `auto`: `all` on CUDA, `gradients` on CPU."
    )


class CheckpointConfig(Room):
    every: PositiveInt = Field(10, description="Save each so many iterations, and at the end.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept.")
    resume: Literal["auto", "never"] = Field("auto", description="`auto`: go on from the newest whole checkpoint of run.dir.")


class ClusterConfig(Room):
    ranks_per_node: PositiveInt = Field(8, description="Processes a node, one an accelerator.")
    timeout: Annotated[float, Field(ge=5, le=604800)] = Field(
        1800.0,
        description="Seconds in which a rank must have moved (a micro-batch, a bucket, a loaded tensor, a game, an engine at work), or "
        "the run is ended with a message that says who is where. Collectives and waits on the store may take a quarter more.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="What ranks run on; `auto`: GPUs where there are any.")


class WarmupConfig(Room):
    """Supervised steps before iteration 1, for models that are too small to begin: next-token loss on tasks and answers of another
    run. Used only where `pairs` is given."""

    pairs: Path | None = Field(None, description="A data set that tools/export_curriculum.py made; null: no warm-up.")
    steps: PositiveInt = Field(20, description="Optimiser steps.")
    batch: PositiveInt = Field(32, description="Completions a step.")
    learning_rate: PositiveFloat | None = Field(None, description="Of these steps; null: policy.learning_rate.")
    roles: list[Literal["challenger", "reasoner"]] = Field(
        ["challenger", "reasoner"],
        min_length=1,
        description="`challenger`: passage to accepted task; `reasoner`: question to an answer that was right.",
    )


class AuditConfig(Room):
    """What is looked for in the tasks that the Challenger writes; nothing of it changes what is played or paid."""

    metrics: bool = Field(
        False, description="Write `audit/...` metrics: duplicates, copies, giveaways, letter bias, what gold answers follow from."
    )
    passages: PositiveInt = Field(64, description="Of each iteration the first so many passages are audited.")
    memory: PositiveInt = Field(20_000, description="Questions that duplicates are looked for among.")
    grounded_answers: int = Field(
        0, ge=0, description="Times that an audited Reasoner's task is answered again with its passage in view; 0: not."
    )
    options_only: int = Field(
        0, ge=0, description="Times that an audited multiple choice task is answered from its options alone; 0: not."
    )


class TelemetryConfig(Room):
    tensorboard: bool = Field(True, description="Write TensorBoard's files too (run.dir/tensorboard).")
    wandb_project: str | None = Field(None, description="Log to this Weights & Biases project (needs the wandb package).")
    episodes: bool = Field(True, description="Write every episode to episodes.jsonl.")


class Config(Room):
    """A whole recipe."""

    run: RunConfig
    train: TrainConfig = TrainConfig()
    corpus: CorpusConfig
    game: GameConfig = GameConfig()
    rollout: RolloutConfig = RolloutConfig()
    policy: PolicyConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    warmup: WarmupConfig = WarmupConfig()
    audit: AuditConfig = AuditConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
