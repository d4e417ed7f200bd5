"""The inventory of the base: equal before and after building, in tables, and said where much stays whole."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from conftest import ARCHITECTURES
from torch import nn
from transformers.pytorch_utils import Conv1D

import qlora_kit as qk
from qlora_kit import memory, models
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import LoraSpec, ModelSpec, TrainingSpec
from qlora_kit.errors import KitError
from qlora_kit.memory.meta_device import _skeleton
from qlora_kit.models import inventory
from qlora_kit.quantization import layers
from qlora_kit.quantization.int4 import Int4Linear
from qlora_kit.runs import card as cards
from qlora_kit.system.safe_bitsandbytes import bnb

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Bases whose weights are not all in plain linear layers and embeddings.
OTHERS = {
    "mixtral": ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "deepseek": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 2,
        },
    ),
    "falcon": ("FalconConfig", {}),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 32}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "convbert": ("ConvBertConfig", {"embedding_size": 16, "num_groups": 2}),
    "squeezebert": ("SqueezeBertConfig", {"embedding_size": 64}),
    "deberta": ("DebertaV2Config", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Return a function from a base's name to an experiment with tiny random weights of it."""
    root = tmp_path_factory.mktemp("others")

    def make(name: str, **changes) -> Experiment:
        folder = root / name
        if not folder.exists():
            kind, extra = OTHERS[name]
            config = getattr(transformers, kind)(**{"vocab_size": 200, "pad_token_id": 0, **SIZES, **extra})
            torch.manual_seed(0)
            decoder = models.is_decoder(config)
            auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
            auto.from_config(config).save_pretrained(folder)
        experiment = Experiment(
            name=name,
            model=ModelSpec(str(folder)),
            lora=LoraSpec(r=4, alpha=8, dropout=0.0),
            training=TrainingSpec(precision="fp32", batch_size=2),
        )
        return experiment.override({key.replace("__", "."): value for key, value in changes.items()})

    return make


def built(experiment):
    # Without a pad token it is not probed, which ConvBERT would not pass: what is asked here is what its layers are.
    return models.build(experiment, ["a", "b"], device=CPU)


def batch(rows: int = 3, width: int = 7):
    ids = torch.randint(3, 200, (rows, width), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def groups(model, experiment):
    return {(group.kind, group.stored_as): group for group in inventory.take(model, experiment).groups}


def counted(**more) -> inventory.Group:
    about = {"kind": "linear layers", "stored_as": "nf4", "quantized": True, "trained": "adapters", "reason": ""}
    return inventory.Group(**about | {"tensors": 1, "parameters": 1000, "example": "a.weight"} | more)


def test_an_inventory_as_text_as_a_table_and_as_a_list():
    whole = {"stored_as": "torch.float16", "quantized": False, "trained": ""}
    taken = inventory.Inventory((
        counted(tensors=1200, parameters=6000),
        counted(**whole, parameters=500, reason="too small"),
        counted(**whole, parameters=1500, reason="too odd", example="b.weight"),
        counted(**whole | {"trained": "themselves"}, kind="embeddings", parameters=2000),
    ))  # fmt: skip
    assert taken.parameters == 10_000
    assert (
        str(taken)
        == "60.0% linear layers in nf4, 20.0% linear layers in torch.float16, 20.0% embeddings in torch.float16"
    )
    listed = taken.to_list()
    assert [row["share"] for row in listed] == [0.6, 0.05, 0.15, 0.2]
    assert listed[2] == {
        "kind": "linear layers", "stored_as": "torch.float16", "quantized": False, "trained": "", "reason": "too odd",
        "tensors": 1, "parameters": 1500, "example": "b.weight", "share": 0.15,
    }  # fmt: skip
    assert taken.table() == inventory.table(listed)
    first, second, _, last = taken.table()
    assert first == {
        "of the base": "linear layers", "tensors": "1,200", "numbers": "6,000", "share": "60.0%", "stored as": "nf4",
        "trained": "by adapters", "why": "",
    }  # fmt: skip
    assert (second["trained"], second["why"], last["trained"]) == ("", "too small", "yes")
    nothing = inventory.Inventory(())
    assert (nothing.parameters, nothing.whole_share, nothing.to_list(), str(nothing)) == (0, 0.0, [], "")


@pytest.mark.parametrize(("whole", "said"), [(2000, False), (2001, True), (8000, True), (0, False)])
def test_what_stays_whole_is_said_from_a_fifth_of_what_is_multiplied_on(tiny_experiment, whole, said):
    """Embeddings and norms are not multiplied by, so they do not count."""
    taken = inventory.Inventory((
        counted(parameters=8000),
        counted(quantized=False, kind="other matrices", tensors=3, parameters=whole, reason="in no layer"),
        counted(quantized=False, kind="embeddings", parameters=90_000, reason="not asked for"),
        counted(quantized=False, kind="norms and biases", parameters=90_000),
    ))  # fmt: skip
    assert taken.whole_share == pytest.approx(whole / (8000 + whole))
    experiment = tiny_experiment("bert")
    found = taken.warning(experiment)
    assert (found is not None) == said
    assert taken.warning(experiment.override({"quantization.scheme": "none"})) is None
    if said:
        assert found == (
            f"{whole / (8000 + whole):.0%} of the weights that {experiment.model.name} multiplies by stay in 16 or 32 "
            f"bits although quantization.scheme is nf4: {whole:,} in 3 of its other matrices (in no layer)"
        )
    # An embedding that was to be in 4 bits and is not, beside it.
    asked = taken.warning(experiment.override({"quantization.embeddings": "nf4"}))
    assert asked == "; ".join(
        [found] * said
        + [
            f"no embedding of {experiment.model.name} is stored in 4 bits although quantization.embeddings is nf4: "
            "90,000 in 1 of its embeddings (not asked for)"
        ]
    )
    bare = inventory.Inventory((counted(),))
    asked = bare.warning(experiment.override({"quantization.embeddings": "nf4"}))
    assert asked.endswith("quantization.embeddings is nf4: it has none")


@pytest.mark.parametrize("scheme", ["nf4", "int4", "int8", "none"])
def test_shapes_and_the_built_model_have_one_inventory(tiny_experiment, scheme):
    for name in ARCHITECTURES:
        experiment = tiny_experiment(name, quantization__scheme=scheme)
        _same_before_and_after(experiment)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "squeezebert"])
def test_unusual_bases_have_one_inventory_too(other, name):
    _same_before_and_after(other(name, quantization__embeddings="nf4"))


def _same_before_and_after(experiment):
    model = built(experiment)
    after = inventory.take(model, experiment)
    skeleton = _skeleton(experiment, "fp32", 2, memory.DEVICES["cpu"])
    assert inventory.take(skeleton, experiment) == after
    # Every number of the base once: as many as transformers' own class has without a head.
    config = models.load_config(experiment.model)
    with torch.device("meta"):
        bare = transformers.AutoModel.from_config(config)
    if getattr(bare, "pooler", None) is not None:
        bare.pooler = None
    assert after.parameters == sum(parameter.numel() for parameter in bare.parameters())
    assert sum(group["share"] for group in after.to_list()) == pytest.approx(1)


def test_experts_are_counted_whole_and_said(other):
    experiment = other("mixtral")
    found = groups(built(experiment), experiment)
    # Two layers of four experts, each with three matrices of 64 x 64, and a router of 4 x 64.
    experts = [group for group in inventory.take(built(experiment), experiment).groups if "Experts" in group.reason]
    assert [group.parameters for group in experts] == [2 * 4 * 3 * 64 * 64]
    assert (
        found["linear layers", "nf4"].trained == "adapters" and found["linear layers", "nf4"].parameters == 8 * 64 * 64
    )
    whole = 2 * 4 * 3 * 64 * 64 + 2 * 4 * 64
    taken = inventory.take(built(experiment), experiment)
    assert taken.whole_share == pytest.approx(whole / (whole + 8 * 64 * 64))
    assert taken.warning(experiment).startswith("75% of the weights")
    assert taken.warning(experiment.override({"quantization.scheme": "none"})) is None


def test_a_mixture_is_planned_as_it_is_measured(other):
    experiment = other("mixtral")
    planned = memory.plan(experiment, batch=4, length=16, device="cpu", labels=2)
    measured = memory.measure(experiment, batch=4, length=16, steps=1, labels=2)
    assert planned.parts["base, other matrices"] == measured.parts["base, other matrices"] == 4 * (98304 + 512)
    assert planned.total == pytest.approx(measured.total, rel=0.005)
    assert "note: 75% of the weights" in str(planned) and "other matrices in float32" in str(planned)
    assert memory.plan(experiment, batch=4, length=16, device="T4", labels=2).total > 0  # in fp16, on the meta device


def test_a_model_that_goes_by_values_has_no_plan_and_says_so(tmp_path):
    config = transformers.JetMoeConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16, num_local_experts=4,
        num_experts_per_tok=2, intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    experiment = Experiment("x", ModelSpec(str(tmp_path), random_weights=True), lora=LoraSpec())
    with pytest.raises(KitError, match=r"no plan for .*: a step of it cannot be run on shapes alone \(.*\)"):
        memory.plan(experiment, batch=2, length=8, device="cpu")


def test_a_scheme_that_stores_nothing_is_refused_before_weights_are_read(other):
    with pytest.raises(KitError, match=r"scheme is nf4, and .* no linear layer .* those of Conv1d\): use .* none"):
        built(other("squeezebert"))
    with pytest.raises(KitError, match=r"no linear layer to put an adapter on \(its matrices are those of Conv1d\)"):
        built(other("squeezebert", quantization__scheme="none"))


def test_all_linear_takes_layers_by_their_full_names(other):
    # ConvBERT calls grouped layers, which PEFT cannot adapt, by the name of linear ones: dense.
    experiment = other("convbert")
    model = built(experiment)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert any(name.endswith("attention.output.dense") for name in adapted)
    assert not any(name.endswith("intermediate.dense") for name in adapted)
    loss = model(**batch(), labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("convbert", "dense", r"'dense' names .*\.dense, a GroupedLinearLayer, .*name layers in full, such as base\."),
        ("convbert", "conv1d.depthwise", r"depthwise, a Conv1d, which takes no adapter"),
        ("mixtral", "gate_up_proj", r"gate_up_proj, a weight of MixtralExperts, which takes no adapter"),
        ("mixtral", "experts", r"names model\.layers\.0\.mlp\.experts, a MixtralExperts, which takes no adapter"),
        ("mixtral", "q_prj", r"called 'q_prj'. Did you mean 'q_proj'"),
    ],
)
def test_targets_that_take_no_adapter_are_refused_with_the_reason(other, name, target, message):
    if name == "convbert" and target.startswith("conv1d"):
        inner = built(other("convbert")).get_base_model()
        target = next(n.split(".layer.0.")[1] for n, m in inner.named_modules() if isinstance(m, nn.Conv1d))
        message = r"a Conv1d, which takes no adapter"
    with pytest.raises(KitError, match=message):
        built(other(name, lora__target_modules=[target]))


def test_what_peft_itself_refuses_to_adapt_is_one_line(tmp_path):
    # Mamba's kernels read the weight of its last layer directly.
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=200, pad_token_id=0, state_size=8)
    config.save_pretrained(tmp_path)
    experiment = Experiment("x", ModelSpec(str(tmp_path), random_weights=True, pooling="mean"), lora=LoraSpec())
    with pytest.raises(
        KitError, match=r"PEFT puts no adapters on .* 'out_proj' .* are dt_proj, in_proj, out_proj, x_proj:"
    ):
        built(experiment)
    named = experiment.override({"lora.target_modules": ["in_proj", "x_proj"]})
    assert inventory.take(built(named), named).groups[0].trained == "adapters"


def test_a_shared_experts_layers_are_adapted_and_not_the_experts(other):
    # PEFT would take `gate_proj` for the experts' layers of transformers 4, and put adapters on their weight.
    config = built(other("deepseek", lora__dropout=0.1)).peft_config["default"]
    assert not config.target_parameters
    assert "model.layers.1.mlp.shared_experts.gate_proj" in config.target_modules


@pytest.mark.parametrize("scheme", ["nf4", "int8", "int4"])
def test_layers_of_a_subclass_are_quantized(other, scheme):
    # transformers replaces layers of exactly two classes, and Falcon's linear layers are of a third.
    experiment = other("falcon", quantization__scheme=scheme)
    found = groups(built(experiment), experiment)
    assert set(found) == {("linear layers", scheme), ("embeddings", "float32"), ("norms and biases", "float32")}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Written(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class WrittenConv1D(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


def test_what_computes_as_a_linear_layer_is_one():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    attention = nn.MultiheadAttention(64, 2)
    for layer in (
        nn.Linear(4, 5),
        Conv1D(4, 5),
        Written(4, 5),
        WrittenConv1D(4, 5),
        parametrized,
        bnb.nn.Linear4bit(4, 5).to("cpu"),
    ):
        assert layers.is_linear(layer), layer
    for layer in (Doubled(4, 5), Router(4, 5), attention.out_proj, nn.Conv1d(4, 5, 1), nn.Embedding(4, 5)):
        assert not layers.is_linear(layer), layer
    model = nn.ModuleDict(
        {"a": Written(64, 64), "b": Router(64, 64), "c": attention, "d": parametrized, "head": nn.Linear(64, 2)}
    )
    model._keep_in_fp32_modules = ["e"]
    model["e"] = nn.Linear(64, 64)
    assert layers.quantizable(model, ["head"]) == ["a", "d"]
    reasons = layers.why_whole(nn.Sequential(model), ["head"])
    reasons = {name.removeprefix("0."): reason for name, reason in reasons.items()}
    assert reasons["b"] == "Router is no plain linear layer" and reasons["e"] == "transformers keeps it in 32 bits"
    x = torch.randn(3, 64)
    before = model["a"](x), model["d"](x)
    for scheme, kind in (("nf4", bnb.nn.Linear4bit), ("int4", Int4Linear)):
        copy = nn.ModuleDict({"a": Written(64, 64), "d": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))})
        copy.load_state_dict({k: v for k, v in model.state_dict().items() if k[0] in "ad"})
        spec = qk.Quantization(scheme)
        if scheme == "int4":
            from qlora_kit.quantization.int4 import quantize_linears_

            quantize_linears_(copy, spec)
        else:
            models.quantize_with_bitsandbytes_(copy, spec, [], torch.float32)
        for key, wanted in zip("ad", before, strict=True):
            assert isinstance(copy[key], kind)
            assert (copy[key](x) - wanted).abs().max() < 0.3


@pytest.mark.parametrize("name", ["gemma3", "opt", "deberta"])
def test_an_embedding_of_any_class_keeps_its_behaviour_in_4_bits(other, name):
    """In 4 bits a base computes what it computes with the dequantized tables in full precision."""
    four = built(other(name, quantization__embeddings="nf4", quantization__scheme="none")).eval()
    full = built(other(name, quantization__scheme="none")).eval()
    tables = {n: m for n, m in four.get_base_model().named_modules() if isinstance(m, models.Embedding4bit)}
    kinds = {
        type(m).__mro__[1].__name__ if type(m) is not models.Embedding4bit else "Embedding" for m in tables.values()
    }
    assert kinds & {"Gemma3TextScaledWordEmbedding", "OPTLearnedPositionalEmbedding", "Embedding"}
    for n, table in tables.items():
        plain = full.get_base_model().get_submodule(n)
        weight = table.weight
        assert (weight.shape, weight.dtype, weight.device) == (plain.weight.shape, plain.weight.dtype, CPU)
        assert not torch.equal(weight + 0, plain.weight)
        plain.weight.data = weight + 0
    with torch.no_grad():
        assert torch.equal(four(**batch()).logits, full(**batch()).logits)
    assert len(tables) == sum(isinstance(m, nn.Embedding) for m in full.get_base_model().modules())


def test_embeddings_that_cannot_be_stored_in_4_bits_are_said(tiny_experiment):
    experiment = tiny_experiment("bert", quantization__embeddings="nf4")  # rows of 32 numbers
    taken = inventory.take(built(experiment), experiment)
    assert "no embedding of" in taken.warning(experiment) and "its rows have 32 numbers" in taken.warning(experiment)
    assert layers.why_table_whole(nn.Embedding(4, 64, max_norm=1.0)) == "a look-up changes its rows (max_norm)"


def test_a_run_records_and_shows_its_inventory_and_warns(other, topics, tmp_path, caplog):
    tokenizer = models.load_tokenizer(ModelSpec("embedded:minilm"))
    experiment = other("mixtral")
    folder = tmp_path / "base"
    config = models.load_config(experiment.model)
    config.vocab_size = len(tokenizer)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    experiment = experiment.override({"model.name": str(folder), "training.max_steps": 1, "tracking.wandb": "none"})
    with caplog.at_level(logging.WARNING):
        run = qk.finetune(experiment, data=topics, out=tmp_path, progress=False)
    assert "75% of the weights that" in caplog.text
    recorded = run.training["inventory"]
    assert recorded == memory.plan(experiment, device="cpu").inventory.to_list()
    card = cards.model_card(run.experiment, run.training, None)
    assert "| other matrices | 98,304 |" in card and "MixtralExperts keeps it without a linear layer" in card
    without = {key: value for key, value in run.training.items() if key != "inventory"}
    assert "| of the base |" not in cards.model_card(run.experiment, without, None)  # runs of before
    assert [row["of the base"] for row in inventory.table(recorded)] == [group["kind"] for group in recorded]
