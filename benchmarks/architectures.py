"""Take some forty kinds of models through all that the kit does with one: results/architectures.json.

    python benchmarks/architectures.py                     # every family; about five minutes on two cores
    python benchmarks/architectures.py --families bert t5  # some of them
    python benchmarks/architectures.py --graphs            # on a GPU, CUDA graphs as well: captured, or why not

Each family has its real configuration class, two tiny layers and random weights. A step works where its result is
right, not where it merely ends: predictions of a text alone are those in company, a run read back in a new process
predicts the same bits, one that was cut off and gone on with ends in the same weights, a merged model computes what the
adapters beside an unquantized base do, and the plan's inventory of the base is that of the model that was built. A step
is refused where the kit says in one line why it does not do it, before anything is written. Anything else fails, and
the command with it.

A row a family and step. With `--append` rows of other commands stay, and the same command goes on where it was cut
off; `--seconds` cuts it off by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# The library first: it imports bitsandbytes safely.
from common import offline as offline
from common import recording
from common.refusals import told_in_a_line

import qlora_kit as qk
from qlora_kit import export, memory, models
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import DataSpec, LoraSpec, ModelSpec, TrainingSpec
from qlora_kit.kernels import cuda_graphs
from qlora_kit.system.environment import environment
from qlora_kit.system.files import write_json

# isort: split
import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

KEY = ("device", "family", "step")
# In this order: each step needs the results of the steps before it.
STEPS = ("plan", "train", "predict", "reload", "resume", "merge")
TASK = "single_label"
LENGTH = 48
# Largest difference between two ways to the same logits: on a CPU sums differ in order, on a GPU kernels differ too.
CLOSE = {"cpu": 1e-5, "cuda": 1e-3}

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ENCODER = {**SIZES, "max_position_embeddings": 64}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
ENCODER_DECODER = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        config: Name of its configuration class in transformers.
        sizes: Settings that make it tiny.
        auto: The automatic class of transformers that builds the base.
        changes: Changes of its experiment from the others'.
        refused: Steps that the kit is known to refuse; the test checks this.
        idle: Part of the names of layers that do not affect the mean of the states; their adapters never change.
    """

    config: str
    sizes: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    refused: tuple[str, ...] = ()
    idle: str | None = None


def encoder(config: str, sizes: dict[str, Any] = ENCODER, **more: Any) -> Family:
    return Family(config, {**sizes, **more}, "AutoModel")


def decoder(config: str, sizes: dict[str, Any] = DECODER, **more: Any) -> Family:
    return Family(config, {**sizes, **more})


MEAN = {"model.pooling": "mean"}
RUN = STEPS[1:]  # all that needs a run
FAMILIES = {
    # encoders
    "bert": encoder("BertConfig"),
    "roberta": encoder("RobertaConfig"),
    "xlm-roberta": encoder("XLMRobertaConfig"),
    "camembert": encoder("CamembertConfig"),
    "distilbert": encoder(
        "DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 2, "max_position_embeddings": 64}
    ),
    "electra": encoder("ElectraConfig", embedding_size=16),
    "albert": encoder("AlbertConfig", embedding_size=16),
    "mpnet": encoder("MPNetConfig"),
    "deberta": encoder("DebertaConfig", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": encoder("DebertaV2Config", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": encoder("ModernBertConfig", cls_token_id=101, sep_token_id=102, bos_token_id=101, eos_token_id=102),
    "xlnet": encoder("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
    # Refused because padding changes the result: Funnel halves its states with padding included, ConvBERT's
    # convolutions read padding, and FNet mixes all positions.
    "funnel": dataclasses.replace(
        encoder(
            "FunnelConfig",
            {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1},
            architectures=["FunnelModel"],
        ),
        refused=RUN,
    ),
    "convbert": dataclasses.replace(encoder("ConvBertConfig", embedding_size=16), refused=RUN),
    "fnet": dataclasses.replace(encoder("FNetConfig"), refused=RUN),
    # Its projections are convolutions.
    "squeezebert": dataclasses.replace(encoder("SqueezeBertConfig", embedding_size=32), refused=STEPS),
    "big_bird": encoder("BigBirdConfig", block_size=4, num_random_blocks=1, attention_type="original_full"),
    # Its forward pass depends on values, so it cannot be planned. Its layers for global tokens are unused without such
    # tokens.
    "longformer": dataclasses.replace(
        encoder("LongformerConfig", attention_window=8, pad_token_id=0), refused=("plan",), idle="_global"
    ),
    "nomic_bert": encoder("NomicBertConfig"),
    "ernie": encoder("ErnieConfig"),
    "roformer": encoder("RoFormerConfig", embedding_size=32),
    "megatron-bert": encoder("MegatronBertConfig"),
    # decoders
    "gpt2": decoder("GPT2Config", GPT2),
    "gpt_neo": decoder(
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        max_position_embeddings=64,
    ),
    "gptj": decoder("GPTJConfig", GPT2, rotary_dim=8),
    "gpt_neox": decoder("GPTNeoXConfig", ENCODER),
    "llama": decoder("LlamaConfig"),
    "mistral": decoder("MistralConfig"),
    "qwen2": decoder("Qwen2Config"),
    "qwen3": decoder("Qwen3Config", head_dim=16),
    "gemma2": decoder("Gemma2Config", head_dim=16, sliding_window=16),
    "gemma3_text": decoder("Gemma3TextConfig", head_dim=16, sliding_window=16),
    "phi3": decoder("Phi3Config"),
    "opt": decoder("OPTConfig", ENCODER, ffn_dim=64, word_embed_proj_dim=32),
    "opt, projected": decoder("OPTConfig", ENCODER, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
    "bloom": decoder("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "falcon": decoder("FalconConfig", ENCODER),
    "stablelm": decoder("StableLmConfig"),
    # transformers has no classification class for it.
    "granite": dataclasses.replace(decoder("GraniteConfig"), refused=STEPS),
    "granite, mean": Family("GraniteConfig", DECODER, changes=MEAN),
    # mixtures
    "mixtral": decoder("MixtralConfig", num_local_experts=4),
    "qwen2_moe": decoder(
        "Qwen2MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "deepseek_v3": decoder(
        "DeepseekV3Config",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": decoder("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "olmoe, mean": Family("OlmoeConfig", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}, changes=MEAN),
    # encoder-decoders: refused
    "t5": Family("T5Config", ENCODER_DECODER, "AutoModelForSeq2SeqLM", refused=STEPS),
    "bart": Family(
        "BartConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
        "AutoModelForSeq2SeqLM",
        refused=STEPS,
    ),
}


# --- the steps of a family --------------------------------------------------------------------------------------


class Wrong(Exception):
    """A step finished with a wrong result."""


def make_base(name: str, folder: Path) -> Path:
    """Write a family's base with random weights, and MiniLM's tokenizer, into a folder."""
    tokenizer = models.load_tokenizer(ModelSpec("embedded:minilm"))
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(
        **{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **family.sizes}
    )
    torch.manual_seed(0)
    with models.quiet():
        getattr(transformers, family.auto).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(file: Path) -> Path:
    """Write three of Banking77's intents as a CSV file."""
    full = qk.banking77()
    chosen = [0, 11, 40]
    rows = [
        (text, full.label_names[label])
        for text, label in zip(full.train.texts, full.train.labels, strict=True)
        if label in chosen
    ]
    kept = [row for label in chosen for row in [row for row in rows if row[1] == full.label_names[label]][:16]]
    quoted = ['"' + text.replace('"', '""') + f'",{label}' for text, label in kept]
    file.write_text("\n".join(["text,label", *quoted, ""]), encoding="utf-8")
    return file


def experiment_of(name: str, base: Path, data: Path) -> Experiment:
    """Return the experiment for training a family."""
    return Experiment(
        name="architecture",
        model=ModelSpec(str(base)),
        data=DataSpec(str(data), test=0.25, validation=0.25, max_length=LENGTH),
        lora=LoraSpec(r=4, alpha=8, dropout=0.1),
        # fp32, so that comparisons do not depend on the CPU
        training=TrainingSpec(
            epochs=2, batch_size=8, learning_rate=5e-3, precision="fp32", threads=1, logging_steps=1, graphs="none"
        ),
    ).override({"tracking.wandb": "none", **FAMILIES[name].changes})


class _StopAt(TrainerCallback):
    """Interrupt a run in its second epoch, like a killed process."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at the first step after the first epoch."""
        if state.epoch > 1:
            raise KeyboardInterrupt


def _weights(run: qk.Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / max(1.0, float(np.abs(other).max())))


def _logits_in_a_new_process(path: str, texts: list[str]) -> np.ndarray:
    torch.set_num_threads(1)
    return np.asarray(qk.load_run(path).predict(texts, progress=None).logits)


class Passage:
    """Take one family through the steps; each step needs the results of the steps before it.

    Args:
        name: A name of `FAMILIES`.
        folder: An empty folder for all files.
        data: The file that `make_data` wrote.
    """

    def __init__(self, name: str, folder: Path, data: Path) -> None:
        self.folder = folder
        self.idle = FAMILIES[name].idle
        self.model_type: str = getattr(transformers, FAMILIES[name].config).model_type
        self.experiment = experiment_of(name, make_base(name, folder / "base"), data)
        self.device = models.default_device().type
        self.texts = list(qk.data.load(self.experiment.data).test.texts)
        self.run: qk.Run | None = None
        self.refused: qk.KitError | None = None

    def trained(self) -> qk.Run:
        """Return the run for later steps, or raise again the reason why there is none."""
        if self.run is None:
            raise self.refused or Wrong("there is no run: training failed")
        return self.run

    def plan(self) -> None:
        """Plan a step; `train` compares the plan's inventory of the base with the built model's."""
        device = memory.find_device() if self.device == "cuda" else memory.DEVICES["cpu"]
        plan = memory.plan(self.experiment, labels=3, device=device)
        whole = sum(plan.parts.get(part, 0) for part in memory.WEIGHTS)
        if not 0 < whole < plan.total:
            raise Wrong(f"the plan has {whole} bytes of weights in {plan.total}")
        self.planned = plan.inventory.to_list()

    def train(self) -> None:
        """Fine-tune; every adapter must have changed."""
        out = self.folder / "runs"
        try:
            self.run = qk.finetune(self.experiment, out=out, progress=False)
        except qk.KitError as error:
            self.refused = error
            written = [item for item in out.rglob("*") if item.is_file() and item.name != ".lock"]
            if written:
                raise Wrong(f"{written[0].name} was written before it was refused: {error}") from error
            raise
        still = [name for name, weight in _weights(self.run).items() if "lora_B" in name and not weight.any()]
        still = [name for name in still if self.idle is None or self.idle not in name]
        if still:
            raise Wrong(f"{len(still)} adapters were given no gradient, the first {still[0]}")
        if self.run.training["inventory"] != getattr(self, "planned", self.run.training["inventory"]):
            raise Wrong("the plan's inventory of the base is not that of the model that was built")

    def predict(self) -> None:
        """Predict each text alone, all together, and in another order."""
        run = self.trained()
        together = run.predict(self.texts, progress=None).logits
        for order in (list(reversed(self.texts)), self.texts[:1]):
            again = run.predict(order, progress=None).logits
            where = [self.texts.index(text) for text in order]
            if (apart := _apart(again, together[where])) > CLOSE[self.device]:
                raise Wrong(f"logits of {len(order)} texts in another order are {apart:.1e} apart")
        alone = np.concatenate([run.predict([text], progress=None).logits for text in self.texts])
        if (apart := _apart(alone, together)) > CLOSE[self.device]:
            raise Wrong(f"logits alone and in company are {apart:.1e} apart")

    def reload(self, elsewhere: Callable[..., Any]) -> None:
        """Open the run folder in a new process."""
        run = self.trained()
        there, here = elsewhere(str(run.path), self.texts), run.predict(self.texts, progress=None).logits
        same = np.array_equal(there, here) if self.device == "cpu" else _apart(there, here) <= CLOSE[self.device]
        if not same:
            raise Wrong(f"logits in a new process are {_apart(there, here):.1e} apart")

    def resume(self) -> None:
        """Interrupt a second run and resume it."""
        run = self.trained()
        out = self.folder / "again"
        with contextlib.suppress(KeyboardInterrupt):
            qk.finetune(self.experiment, out=out, progress=False, callbacks=[_StopAt()])
        again = qk.finetune(self.experiment, out=out, progress=False)
        if again.training["timing"]["resumed_from_step"] is None:
            raise Wrong("the run was not resumed but begun anew")
        one, other = _weights(run), _weights(again)
        bound = 0.0 if self.device == "cpu" else CLOSE[self.device]
        apart = max(float((one[name] - other[name]).abs().max()) for name in one)
        if one.keys() != other.keys() or not apart <= bound:
            raise Wrong(f"weights of a resumed run are {apart:.1e} apart")

    def merge(self) -> None:
        """Merge, and compare with unmerged adapters on the base in full precision."""
        run = self.trained()
        target = self.folder / "merged"
        try:
            layout = run.merge(target, progress=False)["layout"]
        except qk.KitError as error:
            if target.exists():
                raise Wrong(f"{target.name} was written before it was refused: {error}") from error
            raise
        _, tokenizer = run.load()
        plain = self.experiment.override({"quantization.scheme": "none"})
        device = models.default_device()
        beside = models.load_trained(
            plain, run.label_names, run.path / "adapter", device=device, pad_token_id=tokenizer.pad_token_id
        )
        merged = export.load_merged(target)
        # A merged decoder has its own pad token. The kit takes no model of the other layout as a base: it runs no code.
        own = models.load_tokenizer(ModelSpec(str(target))) if layout == "transformers" else tokenizer
        one, other = (
            models.forward_texts(
                model, words, self.texts, device=device, precision="fp32", max_length=LENGTH, progress=None
            )
            for model, words in ((merged, own), (beside, tokenizer))
        )
        if (apart := _apart(one, other)) > 10 * CLOSE[self.device]:
            raise Wrong(f"logits of the merged model are {apart:.1e} from those of the adapters beside the base")

    def graphs(self) -> None:
        """Compare training with CUDA graphs and eagerly, without dropout: it draws other numbers in a graph."""
        self.trained()
        without = {"model.dropout": 0.0, "lora.dropout": 0.0}
        spec = self.experiment.override({"training.graphs": "auto", **without})
        model = models.build(spec, ["a", "b", "c"], pad_token_id=0)
        obstacle = cuda_graphs.obstacle(spec.training, model, self.device)
        if obstacle is not None:
            raise qk.KitError(obstacle)
        run = qk.finetune(spec, out=self.folder / "graphs", progress=False)
        found = run.training["graphs"]
        if found["problem"] or not found["captured"]:
            raise qk.KitError(found["problem"] or "no step was captured")
        # Compare losses, not weights: for a gradient near zero, rounding decides the sign, and AdamW makes a full step.
        eager = qk.finetune(self.experiment.override(without), out=self.folder / "eager", progress=False)
        one, other = (np.array([entry["loss"] for entry in each.training["losses"]]) for each in (eager, run))
        if (apart := float(np.abs(one / other - 1).max())) > CLOSE[self.device]:
            raise Wrong(f"losses of steps as graphs are {apart:.1e} from those of eager steps")


@contextlib.contextmanager
def new_processes() -> Iterator[Callable[..., Any]]:
    """Yield a function that runs `_logits_in_a_new_process` in a new process each time."""
    # On a CPU, fork from a server that has only imported the library; forked processes cannot use CUDA.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload([__name__, "qlora_kit.models", "qlora_kit.run"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield lambda *args: pool.submit(_logits_in_a_new_process, *args).result()


def passage(name: str, folder: Path, data: Path, elsewhere: Callable[..., Any], graphs: bool = False) -> list[Any]:
    """Take a family through the steps.

    Args:
        name: A name of `FAMILIES`.
        folder: An empty folder.
        data: The file that `make_data` wrote.
        elsewhere: The function that `new_processes` yields.
        graphs: Whether to train with CUDA graphs too.

    Returns:
        A row for each step: `model_type`, `family`, `task`, `step`, `state` (`works`, `refused`, `fails`) and `reason`.
    """
    way = Passage(name, folder, data)
    rows = []
    for step in (*STEPS, *(["graphs"] if graphs else [])):
        state, reason = "works", None
        try:
            getattr(way, step)(*([elsewhere] if step == "reload" else []))
        except qk.KitError as error:
            state, reason = "refused", str(error)
        except (Exception, KeyboardInterrupt) as error:
            state, reason = "fails", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if reason is not None:
            reason = reason.replace(str(folder), "FOLDER")
        row = {"model_type": way.model_type, "family": name, "task": TASK, "step": step}
        rows.append({**row, "state": state, "reason": reason})
    return rows


# --- all of them ------------------------------------------------------------------------------------------------


@told_in_a_line
def main() -> int:
    """Take the families through and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs too; needs a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no family after so long")
    parser.add_argument("--out", default="results/architectures.json")
    recording.add_options(parser)
    options = parser.parse_args()
    device = models.default_device()
    if options.graphs and device.type != "cuda":
        parser.error("--graphs needs a GPU")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    provenance = recording.begin(options)
    here, began = environment(device), time.monotonic()
    command = recording.command_line("architectures.py")
    steps = (*STEPS, *(["graphs"] if options.graphs else []))
    makes = [{"device": here["device"], "family": name, "step": step} for name in options.families for step in steps]
    # With --append, an interrupted command is continued: complete families are not repeated.
    before = recording.done(options.out, command, provenance) if options.append else []
    rows: list[dict[str, Any]] = [row for row in before if {name: row[name] for name in KEY} in makes]
    known = {name for name in options.families if sum(row["family"] == name for row in rows) == len(steps)}
    out_of_time = False
    with tempfile.TemporaryDirectory() as temporary, new_processes() as elsewhere:
        data = make_data(Path(temporary) / "data.csv")
        for name in options.families:
            if name in known:
                continue
            if time.monotonic() - began > options.seconds:
                print(f"out of time before {name}: the same command with --append goes on", file=sys.stderr)
                out_of_time = True
                break
            folder = Path(temporary) / name
            folder.mkdir()
            for row in passage(name, folder, data, elsewhere, options.graphs):
                rows.append(provenance.stamped({**row, "device": here["device"]}, here))
                print(f"{name:16} {row['step']:8} {row['state']:8} {row['reason'] or ''}", flush=True)
            # Save after each family, whatever happens next.
            write(Path(options.out), rows, provenance, command, makes, options.append)
    return 1 if out_of_time or any(row["state"] == "fails" for row in rows) else 0


def write(
    out: Path,
    rows: list[dict[str, Any]],
    provenance: recording.Provenance,
    command: str,
    makes: list[dict[str, Any]],
    append: bool,
) -> None:
    """Write rows in the families' order; with `append`, keep those of other families and devices."""
    record = recording.write(out, rows, provenance=provenance, command=command, makes=makes, key=KEY, append=append)
    places, steps = list(FAMILIES), [*STEPS, "graphs"]

    def key(row: dict[str, Any]) -> tuple[int, str, int]:
        return places.index(row["family"]), row["device"], steps.index(row["step"])

    record["rows"] = sorted((row for row in record["rows"] if row["family"] in FAMILIES), key=key)
    write_json(out, record)


if __name__ == "__main__":
    sys.exit(main())
