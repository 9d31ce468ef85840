"""Every text architecture of the installed transformers, tiny and random: verified against plain transformers, site by
site, or refused by tracekit with the reason.

    python -m tests.every_architecture --write         writes builders/ARCHITECTURES.md
    python -m tests.every_architecture LlamaForCausalLM BertForMultipleChoice

Each class is captured the way builders do it, three texts of different lengths in one padded batch, and compared with a
copy of the same weights that runs each text alone, unpadded, in plain eager transformers. A class that would come out
wrong without an error is `wrong`.
"""

import argparse
import copy
import gc
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultipleChoice, GenerationConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
)

from tests.architecture_checks import (
    BlockRun,
    carries,
    explain_attention,
    mixes_values,
    relative,
    watch_blocks,
    watch_eager_attention,
)
from tests.architecture_page import GROUPS, PAGE, TOLERANCE, Kind, Row, cells, counts, table
from tests.tiny_configs import VOCAB_SIZE, tiny_config
from tracekit.config import CaptureConfig
from tracekit.config import GenerationConfig as AnswersSettings
from tracekit.errors import CaptureError, ModelError, UnsupportedSiteError
from tracekit.model.capture import Text, capture
from tracekit.model.choices import Choices, capture_choices
from tracekit.model.decoding import ToAnswer, answer_traced
from tracekit.model.families import OFF_INTERFACE
from tracekit.model.generation import find_padding_rule
from tracekit.model.proof import prove, prove_decoding
from tracekit.model.traced import TracedModel
from tracekit.records import ModelInfo
from tracekit.tensors import unpack_causal

__all__ = ["CASES", "Case", "judge"]

LENGTHS = (20, 7, 13)
NUM_NEW = 8
_BUILD_ERRORS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    RuntimeError,
    IndexError,
    AssertionError,
)

NO_TEXT = {
    "MusicgenForCausalLM": "decodes audio codes, in several rows at once; takes no text",
    "MusicgenMelodyForCausalLM": "decodes audio codes, in several rows at once; takes no text",
    "Gemma4AssistantForCausalLM": "a drafter: runs on the hidden states and keys of another model, not on text",
    "Gemma4UnifiedAssistantForCausalLM": "a drafter: runs on the hidden states and keys of another model, not on text",
}
"""Classes of the mapping that are no text models."""


class Case(NamedTuple):
    """One class."""

    name: str
    model_type: str
    kind: Kind
    auto: str
    """Which auto class loads it."""


_AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "choices": AutoModelForMultipleChoice,
    "masked": AutoModelForMaskedLM,
}


def _cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    with_choices = set(MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES)
    by_parts = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), key=lambda row: (row[1], not row[0].endswith("_text")))
    for model_type, name in by_parts:  # of a class with two configurations, that of the text
        found.setdefault(name, Case(name, model_type, "decoder", "causal"))
    for model_type, name in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.items():
        found.setdefault(name, Case(name, model_type, "encoder", "choices"))
    for model_type, name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.items():
        if model_type not in with_choices and not name.endswith("ForConditionalGeneration"):
            found.setdefault(name, Case(name, model_type, "encoder", "masked"))
    return found


CASES = _cases()
"""By name: all causal classes, all with a multiple-choice head, and encoders that have only a masked one."""


def build(case: Case) -> Any:
    """A tiny model with random weights, loaded with the attention that `load_model` would choose."""
    config: Any = tiny_config(case.model_type)
    if case.kind == "decoder":
        for name in ("is_decoder", "causal"):
            if hasattr(config, name):
                setattr(config, name, True)
    arguments: dict[str, Any] = {}
    family = OFF_INTERFACE.get(config.get_text_config().model_type)
    if family is not None and family.eager_fault(config.get_text_config()) is None:
        arguments["attn_implementation"] = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = _AUTO[case.auto].from_config(config, **arguments).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape) * 0.1
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def judge(case: Case) -> Row:
    """Build a class, capture it, compare it."""
    if case.name in NO_TEXT:
        return Row(case.name, case.kind, {}, 0.0, "no text model: " + NO_TEXT[case.name])
    try:
        model = build(case)
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("eager")
        with torch.no_grad():
            plain(**_inputs(case, [5, 6, 7, 8, 9]), **_without_cache(case))
    except _BUILD_ERRORS as error:
        return Row(case.name, case.kind, {}, 0.0, "not run here: " + _short(error))
    try:
        return _judge(case, model, plain)
    except ModelError as error:
        return Row(case.name, case.kind, {}, 0.0, _short(error))
    except _BUILD_ERRORS as error:
        return Row(case.name, case.kind, {"all": "wrong"}, 0.0, f"{type(error).__name__} {_short(error)}")


def _judge(case: Case, model: Any, plain: Any) -> Row:
    given, reasons = _given(case, model)
    sites = tuple(site for group in given for site in GROUPS[group])
    verdicts = {group: "yes" if group in given else "no" for group in GROUPS}
    if case.auto == "choices":
        del verdicts["next"]
    if not sites:
        return Row(case.name, case.kind, verdicts, 0.0, "; ".join(dict.fromkeys(reasons.values())))
    traced = _traced(case, model)
    prove(traced, sites)
    if case.kind == "decoder" and not traced.is_causal:
        return Row(case.name, case.kind, {}, 0.0, "no causal language model: it sees the tokens that it is to predict")
    texts = [Text([3 + (7 * n + i * (i + 7)) % (VOCAB_SIZE - 3) for i in range(n)], n - 2) for n in LENGTHS]
    config = CaptureConfig(sites=sites)
    try:
        batch = _captured(case, traced, texts, config)
        lone = [_captured(case, traced, [text], config)[0] for text in texts]
    except CaptureError as error:
        return Row(case.name, case.kind, {}, 0.0, _short(error))
    worst = 0.0
    for text, mine, alone in zip(texts, batch, lone, strict=True):
        reference = _Reference(case, plain, traced, text)
        for group in given:
            error, is_known = reference.compare(group, mine, alone)
            worst = max(worst, error)
            if not error <= TOLERANCE:
                verdicts[group] = "wrong"
            elif not is_known and verdicts[group] == "yes":
                verdicts[group] = "alone"
    decoding = ""
    if case.kind == "decoder":
        decoding, error, fault = _decoding(case, traced, plain, given, config)
        worst = max(worst, error)
        reasons |= {"decoding": f"decoding: {fault}"} if fault else {}
    return Row(case.name, case.kind, verdicts, worst, "; ".join(dict.fromkeys(reasons.values())), decoding)


def _decoding(
    case: Case, traced: TracedModel, plain: Any, given: Sequence[str], config: CaptureConfig
) -> tuple[str, float, str]:
    """How answers are captured, the largest relative error of those captured while they were decoded, and why not."""
    asked = [ToAnswer([3 + (7 * n + i * (i + 7)) % (VOCAB_SIZE - 3) for i in range(n)]) for n in LENGTHS]
    traced.model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    find_padding_rule(traced)
    rule = prove_decoding(traced)
    if rule.fault is not None:
        return "pass", 0.0, re.sub(r"is \S+ off", "is off", rule.fault.replace("|", "/"))
    settings = AnswersSettings(num_beams=1, max_new_tokens=NUM_NEW)
    first = answer_traced(traced, asked, settings, config, from_decoding=True)[0].generated.token_ids
    traced.model.generation_config.eos_token_id = [first[NUM_NEW // 2]]
    made = answer_traced(traced, asked, settings, config, from_decoding=True)
    if {one.trace.captured_from for one in made} != {"decoding"}:
        return "pass", 0.0, f"texts of more than {rule.limit} tokens"
    worst = 0.0
    for one in made:
        mine = _by_site(one.text, one.trace)
        alone = _captured(case, traced, [one.text], config)[0]
        reference = _Reference(case, plain, traced, one.text)
        worst = max([worst, *(reference.compare(group, mine, alone)[0] for group in given)])
    return "wrong" if not worst <= TOLERANCE else "length" if rule.by_length else "yes", worst, ""


def _traced(case: Case, model: Any) -> TracedModel:
    info = ModelInfo(
        id=case.name,
        revision="none",
        variant="base",
        adapter=None,
        quantization=None,
        dtype="float32",
        attention="auto",
    )
    return TracedModel(model, None, info, head="choices" if case.auto == "choices" else "lm")


def _given(case: Case, model: Any) -> tuple[list[str], dict[str, str]]:
    """Groups that the model proves, and why not the others."""
    groups = [group for group in GROUPS if group != "next" or case.auto != "choices"]
    reasons: dict[str, str] = {}
    try:
        prove(_traced(case, model), [site for group in groups for site in GROUPS[group]])
        return groups, reasons
    except ModelError:
        pass
    given: list[str] = []
    for group in groups:
        try:
            prove(_traced(case, model), GROUPS[group])
            given.append(group)
        except (UnsupportedSiteError, ModelError) as error:
            reasons[group] = _short(error)
    return given, reasons


def _captured(case: Case, traced: TracedModel, texts: Sequence[Text], config: CaptureConfig) -> list[dict[str, Any]]:
    """Per text the tensors by site, layer by layer: attention as (H, T, T)."""
    if case.auto == "choices":
        items = [Choices([text]) for text in texts]
        made: list[Any] = [*capture_choices(traced, items, config)]
    else:
        made = [*capture(traced, texts, config)]
    return [_by_site(text, trace) for text, trace in zip(texts, made, strict=True)]


def _by_site(text: Text, trace: Any) -> dict[str, Any]:
    """The tensors of a text by site, layer by layer."""
    tensors: dict[str, Any] = {}
    for spec in trace.specs:
        value, length = trace.tensors[spec.name], len(text.token_ids)
        if spec.layout == "causal":
            value = unpack_causal(value, np.arange(length), length)
        elif spec.name.startswith("attentions"):
            value = value.reshape(*value.shape[:2], length, length)
        layers = zip(spec.layers, value, strict=True) if spec.layers else [(0, value)]
        tensors.setdefault(spec.name.split(".")[0], {}).update(layers)
    tensors["logits"] = getattr(trace, "logits", None)
    return tensors


def _inputs(case: Case, ids: Sequence[int]) -> dict[str, Any]:
    row = torch.tensor([list(ids)])
    return {"input_ids": row[:, None]} if case.auto == "choices" else {"input_ids": row}


def _without_cache(case: Case) -> dict[str, Any]:
    return {} if case.auto == "choices" else {"use_cache": False}


class _Reference:
    """One text in plain eager transformers, alone and unpadded, with what went through each block."""

    def __init__(self, case: Case, plain: Any, traced: TracedModel, text: Text) -> None:
        paths = {module: path for path, module in traced.model.named_modules()}
        blocks = [plain.get_submodule(paths[block]) for block in traced.anatomy.blocks]
        with torch.inference_mode(), watch_blocks(blocks) as runs, watch_eager_attention(blocks) as self.handed:
            self.output = plain(
                **_inputs(case, text.token_ids),
                output_hidden_states=True,
                output_attentions=True,
                **_without_cache(case),
            )
        self.runs: list[BlockRun] = runs
        self.length = len(text.token_ids)  # Reformer pads a text by itself
        self.config = plain.config.get_text_config()

    def compare(self, group: str, mine: dict[str, Any], alone: dict[str, Any]) -> tuple[float, bool]:
        """Largest relative error of a group of sites, and whether plain transformers itself says so."""
        between = max(relative(mine[s][n], alone[s][n]) for s in GROUPS[group] if s != "topk_ids" for n in mine[s])
        error, is_known = getattr(self, f"_{group}")(mine)
        return max(between, error), is_known

    def _hidden(self, mine: dict[str, Any]) -> tuple[float, bool]:
        theirs = self.output.hidden_states
        if len(theirs) != len(mine["hidden_states"]):
            return float("inf"), True
        return max(relative(mine["hidden_states"][n], one[0, : self.length]) for n, one in enumerate(theirs)), True

    def _attn(self, mine: dict[str, Any]) -> tuple[float, bool]:
        theirs = [one for one in self.output.attentions or () if one is not None]
        own = [mine["attentions"][layer] for layer in sorted(mine["attentions"])]
        if not theirs:
            return 0.0, False
        if len(theirs) != len(own):
            return float("inf"), True
        return max(relative(a, b[0]) for a, b in zip(own, theirs, strict=True)), True

    def _qkv(self, mine: dict[str, Any]) -> tuple[float, bool]:
        order = sorted(mine["queries"])
        if self.handed and len(order) == len(self.handed):
            handed = [
                relative(mine[site][layer], given[0])
                for layer, qkv in zip(order, self.handed, strict=True)
                for site, given in zip(GROUPS["qkv"], qkv, strict=True)
            ]
            return max(handed), True
        if "attentions" not in mine:
            return 0.0, False
        cap = getattr(self.config, "attn_logit_softcapping", None)
        for layer, query in mine["queries"].items():
            probs, key, value = (mine[site][layer] for site in ("attentions", "keys", "values"))
            scale = (getattr(self.config, "query_pre_attn_scalar", None) or query.shape[-1]) ** -0.5
            if explain_attention(query, key, probs, cap=cap, scale=scale) > 1e-2:
                return 0.0, False
            if mixes_values(probs, value, self.runs[layer].inputs) > TOLERANCE:
                return 0.0, False
        return 0.0, True

    def _resid(self, mine: dict[str, Any]) -> tuple[float, bool]:
        errors = [relative(mine["resid_embed"][0], self.runs[0].x[0])]
        errors += [relative(mine["resid_pre_attn"][n], run.x[0]) for n, run in enumerate(self.runs)]
        errors += [relative(mine["resid_post_mlp"][n], run.out[0]) for n, run in enumerate(self.runs)]
        if "hidden_states" in mine:
            hidden = mine["hidden_states"]
            errors += [relative(value, hidden[n]) for n, value in mine["resid_pre_attn"].items()]
            errors += [relative(mine["resid_post_mlp"][n], hidden[n + 1]) for n in range(len(self.runs) - 1)]
        return max(errors), True

    def _post_attn(self, mine: dict[str, Any]) -> tuple[float, bool]:
        values = [torch.from_numpy(mine["resid_post_attn"][n])[None] for n in range(len(self.runs))]
        with torch.inference_mode():
            return 0.0, all(carries(run, value) for run, value in zip(self.runs, values, strict=True))

    def _next(self, mine: dict[str, Any]) -> tuple[float, bool]:
        logprobs = self.output.logits[0, : self.length].float().log_softmax(-1)
        ids, values = torch.from_numpy(mine["topk_ids"][0]), mine["topk_logprobs"][0]
        best = relative(values, logprobs.topk(ids.shape[-1]).values)
        return max(best, relative(values, logprobs.gather(1, ids))), True


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return re.sub(r" \(\w+\)(?=[: ])", "", text).split("; its attention does not go through")[0][:200]


def main() -> None:
    """Judge all classes, or those that are named; print rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} from all classes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for name in arguments.names or CASES:
        rows.append(judge(CASES[name]))
        print(f"{rows[-1].max_error:8.1e}", *cells(rows[-1]), flush=True)
        gc.collect()
    for kind in ("decoder", "encoder"):
        print(f"{kind}s: {counts(rows, kind)}")
    if arguments.write and not arguments.names:
        PAGE.write_text(table(rows), "utf-8")


if __name__ == "__main__":
    main()
