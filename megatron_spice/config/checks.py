"""What two rooms must agree on: ranks and layout, model and layout, prompts and context, paths and the commands behind them.

Run before torch is imported and before a queue slot is used. Every message names the two numbers and which key to turn.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
from urllib.parse import urlsplit

from megatron_spice.config.chat_templates import chat_problems
from megatron_spice.config.engine_weights import engine_weights_problems
from megatron_spice.config.errors import PIP_INSTALL, ConfigError
from megatron_spice.config.hf import ModelArchitecture, read_architecture
from megatron_spice.config.layout import divisors, layout_problems, rank_problems, tensor_problems
from megatron_spice.config.schema import Config
from megatron_spice.config.server_keys import server_key_problems

NO_SECOND_ENGINE = (
    "game.fixed_challenger=true keeps a second engine beside each, which on CUDA would take the memory of the first; serve "
    "policy.model as it is elsewhere (python -m sglang.launch_server --model-path ...) and name it in rollout.challenger.engines"
)
CORPUS_FORMAT = 2  # that of corpus/manifest.py, which a check does not need to load


def check(config: Config, num_nodes: int = 1, device: str | None = None) -> ModelArchitecture:
    """Judges a recipe as it would run on `num_nodes` nodes, and returns the architecture of its model.

    Args:
        device: "cpu" or "cuda", where that is known; None: what `cluster.device` says.

    Raises:
        ConfigError: it cannot run; the message holds everything that is in the way.
    """
    problems = check_paths(config) + check_layout(config, num_nodes) + check_game(config) + check_offload(config)
    problems += check_remote_engines(config) + check_challenger(config) + chat_problems(config)
    problems += server_key_problems(config.rollout, device or config.cluster.device)
    architecture = None
    try:
        architecture = read_architecture(config.policy.model)
    except ConfigError as error:
        problems += error.problems
    else:
        problems += check_model(config, architecture, num_nodes) + check_corpus(config, architecture)
    if problems or architecture is None:
        raise ConfigError(problems)
    return architecture


def check_paths(config: Config) -> list[str]:
    """Files that must be there, or must not; `policy.model` is judged where it is read."""
    problems = []
    if not config.corpus.path.is_dir():
        found = "is not a folder" if config.corpus.path.exists() else "is not there"
        problems.append(f"corpus.path={config.corpus.path} {found}; make it with `{_corpus_command(config)}`")
    if config.corpus.loader == "dali" and not _is_installed("nvidia.dali"):
        problems.append(
            f"corpus.loader=dali: NVIDIA DALI is not installed; `{PIP_INSTALL} nvidia-dali-cuda130==2.4.0`, "
            "or corpus.loader=mmap, which reads the same passages"
        )
    pairs = config.warmup.pairs
    if pairs is not None and not pairs.is_file():
        problems.append(f"warmup.pairs={pairs} is not there; make it with `python tools/export_curriculum.py RUN_DIR {pairs}`")
    if pairs is not None and config.game.fixed_challenger:
        problems.append(
            f"warmup.pairs={pairs} changes policy.model, which game.fixed_challenger=true keeps as it is; warm up in a run of its own "
            "and give its checkpoint as policy.model"
        )
    if config.run.dir.exists() and not config.run.dir.is_dir():
        problems.append(f"run.dir={config.run.dir} is a file; name a folder, which is made when it is not there")
    if config.checkpoint.resume == "never" and any(config.run.dir.glob("checkpoints/iteration_*")):
        problems.append(
            f"run.dir={config.run.dir} holds checkpoints and checkpoint.resume=never would begin anew among them; "
            "name another run.dir, or go on with checkpoint.resume=auto"
        )
    if config.telemetry.wandb_project and not _is_installed("wandb"):
        problems.append(
            f"telemetry.wandb_project={config.telemetry.wandb_project}: the wandb package is missing; "
            f"`{PIP_INSTALL} wandb`, or telemetry.wandb_project=null"
        )
    return problems


def _corpus_command(config: Config) -> str:
    """What makes the corpus of a recipe, with the labels that its weights ask for."""
    labels = list(config.corpus.weights or {})
    texts = [f"{label.upper()}.jsonl" for label in labels] or ["TEXTS.jsonl"]
    sources = [word for label in labels for word in ("--source", label)]
    rest = ["--tokenizer", "HUGGING_FACE_FOLDER", "--output", str(config.corpus.path)]
    return shlex.join(["python", "tools/preprocess_corpus.py", *texts, *sources, *rest])


def check_offload(config: Config) -> list[str]:
    """Whether there is something to offload, and a place to offload it from."""
    share, policy = config.policy.optimizer_offload, config.policy
    if not share:
        return []
    if config.cluster.device == "cpu":
        return [f"policy.optimizer_offload={share} moves the optimiser off a GPU and cluster.device=cpu has none; give 0"]
    if policy.precision == "fp32":
        return [f"policy.optimizer_offload={share} needs float32 masters of 16-bit weights; give policy.precision=bf16 or fp8, or 0"]
    return []


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def check_layout(config: Config, num_nodes: int) -> list[str]:
    """Ranks against the policy's layout and against the engines."""
    problems = []
    policy, rollout, per_node = config.policy, config.rollout, config.cluster.ranks_per_node
    ranks = num_nodes * per_node
    nodes = f"{num_nodes} node" + ("s" if num_nodes > 1 else "")
    problems += rank_problems(policy, ranks, f"{ranks} ranks ({nodes} x cluster.ranks_per_node={per_node})")
    if rollout.engines:
        return problems
    if per_node % rollout.engines_per_node:
        problems.append(
            f"rollout.engines_per_node={rollout.engines_per_node} does not divide cluster.ranks_per_node={per_node}; "
            f"choose one of {divisors(per_node)}"
        )
    if rollout.engines_per_node * rollout.tensor_parallel_size > per_node:
        problems.append(
            f"rollout.engines_per_node={rollout.engines_per_node} x rollout.tensor_parallel_size="
            f"{rollout.tensor_parallel_size} engine ranks do not fit cluster.ranks_per_node={per_node}; lower one of them"
        )
    return problems


def check_remote_engines(config: Config) -> list[str]:
    """The addresses of servers that run already; whether anybody is there is found when the run starts."""
    rollout = config.rollout
    if not rollout.engines:
        if rollout.router is None:
            return []
        return [
            f"rollout.router={rollout.router} without rollout.engines: a router passes on no weights; list the servers behind "
            "it in rollout.engines"
        ]
    problems = [_not_an_address("rollout.engines", url) for url in rollout.engines]
    if rollout.router is not None:
        problems.append(_not_an_address("rollout.router", rollout.router))
        if rollout.oversample > 1:
            problems.append(
                f"rollout.oversample={rollout.oversample:g} cuts requests short, and which server has which is known to "
                f"rollout.router={rollout.router} alone; give rollout.oversample=1 or leave rollout.router out"
            )
    places = [url.rstrip("/").lower() for url in rollout.engines]
    for place in sorted({place for place in places if places.count(place) > 1}):
        problems.append(f"rollout.engines names {place} more than once; name each server once")
    for key in ("engines_per_node", "tensor_parallel_size"):
        if getattr(rollout, key) != 1:
            problems.append(
                f"rollout.{key}={getattr(rollout, key)} is for colocated engines, and rollout.engines names {len(places)} that "
                f"run already, with ranks of their own; leave rollout.{key} out, or rollout.engines"
            )
    return [problem for problem in problems if problem]


def check_challenger(config: Config) -> list[str]:
    """Who writes the tasks where the policy does not."""
    told, rollout = config.rollout.challenger, config.rollout
    if not config.game.fixed_challenger:
        given = [key for key in ("engines", "tokenizer", "prompt_style") if getattr(told, key)]
        if not given:
            return []
        return [
            f"rollout.challenger.{given[0]} is set and game.fixed_challenger=false lets the policy write the tasks; give "
            "game.fixed_challenger=true, or leave rollout.challenger out"
        ]
    if not told.engines:
        if config.cluster.device == "cuda":
            return [NO_SECOND_ENGINE]
        return []
    problems = [_not_an_address("rollout.challenger.engines", url) for url in told.engines]
    if told.tokenizer is not None and not (told.tokenizer / "tokenizer.json").is_file():
        problems.append(
            f"rollout.challenger.tokenizer={told.tokenizer} holds no tokenizer.json; give the Hugging Face folder of that model"
        )
    own = {url.rstrip("/").lower() for url in rollout.engines}
    for url in told.engines:
        if url.rstrip("/").lower() in own:
            problems.append(
                f"rollout.challenger.engines and rollout.engines both name {url}, whose model changes; give another server for the "
                "Challenger"
            )
    if rollout.oversample > 1:
        problems.append(
            f"rollout.oversample={rollout.oversample:g} cuts requests short, and others may be asking the servers of "
            "rollout.challenger.engines; give rollout.oversample=1"
        )
    return [problem for problem in problems if problem]


def _not_an_address(key: str, url: str) -> str:
    """What is wrong with a URL, or ""."""
    example = "give it as http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port is not None
    except ValueError:
        whole = False
    if not whole:
        return f"{key}={url} is not the address of a server; {example}"
    if parts.username or parts.password:
        return f"{key}: a recipe is copied around and must hold no password; {example}, and the key in SPICE_ENGINE_KEY"
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        return f"{key}={url} has more than a host and a port; {example}"
    return ""


def check_game(config: Config) -> list[str]:
    """Numbers of the game that contradict each other."""
    problems = []
    game, train = config.game, config.train
    if game.group_size < 2:
        problems.append(f"game.group_size={game.group_size}: the mean of one is itself, so nothing is learned; give 2 or more")
    if game.attempts < game.group_size:
        problems.append(
            f"game.attempts={game.attempts} is less than game.group_size={game.group_size}, so no group can be filled; "
            f"give game.attempts={game.group_size} or more"
        )
    if config.rollout.deterministic and config.rollout.oversample > 1:
        problems.append(
            f"rollout.deterministic=true and rollout.oversample={config.rollout.oversample:g}: which passages end first is a matter "
            "of time, so that no rerun is the same; give rollout.oversample=1 or rollout.deterministic=false"
        )
    groups = train.passages * (1 if game.fixed_challenger else 2)
    if train.optimizer_steps > groups:
        problems.append(
            f"train.optimizer_steps={train.optimizer_steps} is more than the {groups} groups that an iteration can have "
            f"(train.passages={train.passages} for each role trained), and a step takes whole groups; lower it"
        )
    if config.policy.dual_clip is not None and train.optimizer_steps == 1:
        problems.append(
            f"policy.dual_clip={config.policy.dual_clip:g} bounds a ratio that is always 1 with train.optimizer_steps=1, so it does nothing; "
            "give train.optimizer_steps=2 or more, or leave policy.dual_clip out"
        )
    return problems


def check_model(config: Config, architecture: ModelArchitecture, num_nodes: int = 1) -> list[str]:
    """The model's numbers against the layout and the prompts."""
    ranks = num_nodes * config.cluster.ranks_per_node
    told = rank_problems(config.policy, ranks)  # check_layout says it with the nodes
    problems = [problem for problem in layout_problems(config.policy, architecture, ranks) if problem not in told]
    if not config.rollout.engines:
        problems += tensor_problems("rollout.tensor_parallel_size", config.rollout.tensor_parallel_size, architecture)
    problems += engine_weights_problems(config, architecture)
    return problems + _check_context(config, architecture)


def _check_context(config: Config, architecture: ModelArchitecture) -> list[str]:
    """A completion alone must leave room for a prompt; how long prompts are is known only when passages are read."""
    problems = []
    limit, longest = config.rollout.context_length, architecture.max_position_embeddings
    if limit is not None and limit > longest:
        problems.append(
            f"rollout.context_length={limit} is more than the model's max_position_embeddings={longest}; lower it"
        )
    context = limit or longest
    roles = ["reasoner_max_tokens"]
    if not config.rollout.challenger.engines:  # whose own context counts
        roles.insert(0, "challenger_max_tokens")
        if config.game.format_selection == "model" and config.game.prompt_style == "chat":
            roles.append("selection_max_tokens")
    for name in roles:
        tokens = getattr(config.game, name)
        if tokens >= context:
            problems.append(
                f"game.{name}={tokens} leaves no room for a prompt in a context of {context} tokens "
                f"({'rollout.context_length' if limit else 'the model'}); give less than {context}"
            )
    return problems


def check_corpus(config: Config, architecture: ModelArchitecture) -> list[str]:
    """The corpus's own description (manifest.json) against the model: vocabulary, and passages against the context."""
    path = config.corpus.path / "manifest.json"
    if not config.corpus.path.is_dir():
        return []
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, longest = manifest["tokenizer"]["vocab_size"], manifest["options"]["max_tokens"]
        passages = {source["name"]: source["passages"] for source in manifest.get("sources", [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [
            f"corpus.path={config.corpus.path}: its manifest.json cannot be read ({type(error).__name__}: {error}); "
            "give a folder that tools/preprocess_corpus.py made"
        ]
    if manifest.get("format", CORPUS_FORMAT) != CORPUS_FORMAT:
        return [
            f"corpus.path={config.corpus.path} is of format {manifest['format']}, this version reads {CORPUS_FORMAT}; make it "
            f"again with: {shlex.join(manifest.get('command') or ['tools/preprocess_corpus.py'])}"
        ]
    problems = []
    if vocabulary > architecture.vocab_size:
        problems.append(
            f"corpus.path={config.corpus.path} was made with a vocabulary of {vocabulary}, policy.model={config.policy.model} "
            f"has {architecture.vocab_size}; make the corpus again with this model as --tokenizer"
        )
    for label in config.corpus.weights or {}:
        if not passages.get(label):
            there = ", ".join(f"{name} ({count:,})" for name, count in passages.items()) or "no source"
            problems.append(
                f"corpus.weights names source {label}, of which corpus.path={config.corpus.path} has no passage; it has {there}"
            )
    context = config.rollout.context_length or architecture.max_position_embeddings
    reads = not config.game.no_corpus and not config.rollout.challenger.engines  # servers have a context of their own
    if reads and longest + config.game.challenger_max_tokens >= context:
        problems.append(
            f"passages of up to {longest} tokens (corpus.path={config.corpus.path}) and game.challenger_max_tokens="
            f"{config.game.challenger_max_tokens} do not fit a context of {context}; raise rollout.context_length (the model "
            f"allows {architecture.max_position_embeddings}), or cut the corpus with a smaller --max-tokens"
        )
    return problems
