"""Configuration: bad values are refused with their path, whichever way they come."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders.csqa.task import CsqaConfig
from builders.introspection.config import IntrospectionConfig
from builders.next_token.config import NextTokenConfig
from builders.trivia_qa.task import TriviaQAConfig
from tracekit.config import (
    AnswersConfig,
    ModelConfig,
    OutputConfig,
    PromptConfig,
    PublishConfig,
    RunConfig,
    SamplesConfig,
    SiteConfig,
    SourceConfig,
    check,
    load_toml,
    template_kwargs,
)
from tracekit.errors import ConfigError
from tracekit.serve.task import ServeConfig
from tracekit.sites import SITES, resolve_sites


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AnswersConfig(generation=SamplesConfig(num_beams=0)), r"`int` >= 1 - at `\$.generation.num_beams`"),
        (AnswersConfig(generation=SamplesConfig(top_p=1.5)), r"\$.generation.top_p"),
        (AnswersConfig(generation=SamplesConfig(temperature=0.0)), r"\$.generation.temperature"),
        (RunConfig(model=ModelConfig(quantize="int3")), r"Invalid enum value 'int3' - at `\$.model.quantize`"),  # type: ignore[arg-type]
        (RunConfig(source=SourceConfig(limit=0)), r"\$.source.limit"),
        (RunConfig(source=SourceConfig(offset=-1)), r"\$.source.offset"),
        (RunConfig(source=SourceConfig(split="../x")), r"split '../x' - at `\$.source.split`"),
        (RunConfig(source=SourceConfig(split="all")), r"split 'all' - at `\$.source.split`; .* and not 'all'"),
        (
            RunConfig(source=SourceConfig(split="dev-1")),
            r"split 'dev-1' - at `\$.source.split`; letters, digits and '_'",
        ),
        (RunConfig(publish=PublishConfig(publish="o/n")), "--publish needs --version, as in --version v1.0.0"),
        (RunConfig(publish=PublishConfig(license="mit")), "--version, --private, --free-local and --license go with"),
        (RunConfig(output=OutputConfig(batch_size=0)), r"\$.output.batch_size"),
        (RunConfig(output=OutputConfig(dataset_config="a/b")), r"dataset name 'a/b' - at `\$.output.dataset_config`"),
        (
            RunConfig(capture=SiteConfig(sites=("hiden",))),
            r"unknown site 'hiden' - at `\$.capture.sites`; sites: hid",
        ),
        (
            AnswersConfig(prompt=PromptConfig(template_kwargs=("x",))),
            r"'x' - at `\$.prompt.template_kwargs`; expected name=",
        ),
    ],
)
def test_a_bad_value_is_refused_with_its_path(config: RunConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        check(config)


@pytest.mark.parametrize("config_type", [TriviaQAConfig, IntrospectionConfig, CsqaConfig, ServeConfig])
def test_records_that_need_the_numbers_of_the_head_cannot_do_without_them(config_type: type[RunConfig]):
    with pytest.raises(
        ConfigError, match=r"--numbers none - at `\$.capture.numbers`; .*records .*; leave --numbers out"
    ):
        check(with_capture(config_type(), numbers="none"))


def test_the_numbers_of_the_head_are_left_out_where_records_can_do_without_them_and_no_site_needs_them():
    assert check(with_capture(NextTokenConfig(), numbers="none")).capture.whole.numbers == "none"
    for sites in (("all",), ("hidden", "topk"), ("topk_logprobs",)):
        with pytest.raises(
            ConfigError, match=r"--numbers none with --sites .* - at `\$.capture.numbers`; .*topk_logprobs"
        ):
            check(with_capture(NextTokenConfig(), numbers="none", sites=sites))


def with_capture(config: RunConfig, **settings: Any) -> RunConfig:
    return msgspec.structs.replace(config, capture=msgspec.structs.replace(config.capture, **settings))


@pytest.mark.parametrize("split", ["train", "dev_1", "a.b", "all2"])
def test_a_split_that_datasets_takes_is_taken(split: str):
    assert check(RunConfig(source=SourceConfig(split=split))).source.split == split


def test_the_defaults_are_those_of_the_work_this_replaces():
    config = check(TriviaQAConfig())
    assert (config.generation.num_beams, config.generation.max_new_tokens, config.output.seed) == (5, 64, 41)
    assert config.capture.sites == ("hidden_states", "attentions")
    assert not config.model.trust_remote_code


def test_a_toml_file_is_read_section_by_section(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('correctness = "alias_in_answer"\n[generation]\nnum_beams = 2\n[capture]\nsites = ["resid"]\n')
    config = load_toml(str(path), TriviaQAConfig)
    assert config.generation.num_beams == 2
    assert config.correctness == "alias_in_answer"
    assert config.capture.sites == ("resid",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[generation]\nnum_beans = 2",
            r"run.toml \[generation\] num_beans = 2: .*unknown field `num_beans`.*Sections: .*\[generation\]",
        ),
        ("[generation]\nnum_beams = 'two'", r"run.toml \[generation\] num_beams = \"two\": Expected `int`, got `str`"),
        ("nonsense", "not TOML"),
    ],
)
def test_a_bad_toml_file_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_toml(str(path), TriviaQAConfig)


def test_a_missing_toml_file_is_named():
    with pytest.raises(ConfigError, match=r"'nowhere.toml' cannot be read: No such file"):
        load_toml("nowhere.toml", TriviaQAConfig)


def test_template_arguments_are_json_where_they_can_be():
    prompt = PromptConfig(template_kwargs=("enable_thinking=false", "n=3", "name=Ada", "list=[1]", "empty="))
    assert template_kwargs(prompt) == {"enable_thinking": False, "n": 3, "name": "Ada", "list": [1], "empty": ""}


def test_site_groups_resolve_in_the_order_of_the_table_each_once():
    assert resolve_sites(("values", "qkv", "hidden")) == ("hidden_states", "queries", "keys", "values")
    assert resolve_sites(("all",)) == tuple(SITES)
    assert resolve_sites(("none",)) == ()


def test_a_file_leaves_the_defaults_of_a_task_where_it_says_nothing(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text("[generation]\nmax_new_tokens = 4\n")
    config = load_toml(str(path), IntrospectionConfig)
    assert (config.generation.max_new_tokens, config.generation.num_beams) == (4, 1)
    assert config.capture.sites == ("hidden_states", "resid_post_mlp")
