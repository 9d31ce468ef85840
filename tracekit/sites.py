"""The table of capture sites: what can be recorded, its axes, and where in a block it is read.

            x  = resid_pre_attn[l]                    resid_embed = resid_pre_attn[0] = hidden_states[0]
            |
norm -> attention (queries, keys, values, attentions)
            |
            +  = resid_post_attn[l]                   what is carried to the MLP's residual addition
            |
norm -> MLP
            |
            +  = resid_post_mlp[l] = resid_pre_attn[l+1] = hidden_states[l+1]
                                                      (the last hidden state is after the final norm)
"""

from typing import Literal, NamedTuple

from tracekit.errors import ConfigError

__all__ = ["ATTENTION_SITES", "DEFAULT_SITES", "GROUPS", "QKV_SITES", "RESID_SITES", "SITES", "Site", "resolve_sites"]


class Site(NamedTuple):
    """One kind of tensor that can be captured."""

    name: str
    axes: str
    """Axes of a stored tensor (layout `full` for attention), see tracekit.axes."""
    source: Literal["output", "attention", "block", "head"]
    """What hands it over: the model's output, the attention function, a block's hooks, or the language-model head."""
    gloss: str


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site(
            "hidden_states", "LTD", "output", "exactly output_hidden_states=True: L+1 entries, index 0 the embeddings"
        ),
        Site("attentions", "LHTT", "attention", "attention probabilities, as output_attentions=True in eager mode"),
        Site("queries", "LHTE", "attention", "queries as attention sees them, after rotary embedding"),
        Site("keys", "LKTE", "attention", "keys as attention sees them, after rotary embedding"),
        Site("values", "LKTE", "attention", "values as attention sees them"),
        Site("resid_embed", "TD", "block", "residual stream before the first block"),
        Site("resid_pre_attn", "LTD", "block", "residual stream at the input of each block"),
        Site("resid_post_attn", "LTD", "block", "residual stream carried to the MLP's residual addition"),
        Site("resid_post_mlp", "LTD", "block", "residual stream at the output of each block"),
        Site("topk_ids", "Tk", "head", "ids of the k most likely next tokens at each position"),
        Site("topk_logprobs", "Tk", "head", "their log-probabilities under the raw model, nats"),
    )
}

DEFAULT_SITES = ("hidden_states", "attentions")
QKV_SITES = ("queries", "keys", "values")
ATTENTION_SITES = ("attentions", *QKV_SITES)
RESID_SITES = ("resid_embed", "resid_pre_attn", "resid_post_attn", "resid_post_mlp")
GROUPS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_states",),
    "attn": ("attentions",),
    "qkv": QKV_SITES,
    "resid": RESID_SITES,
    "topk": ("topk_ids", "topk_logprobs"),
    "all": tuple(SITES),
}


def resolve_sites(names: tuple[str, ...]) -> tuple[str, ...]:
    """Site names for names and groups, in the table's order, each once; `none` stands for no site at all.

    Raises:
        ConfigError: a name is neither a site nor a group.
    """
    chosen: set[str] = set()
    for name in names:
        if name in SITES:
            chosen.add(name)
        elif name in GROUPS:
            chosen.update(GROUPS[name])
        elif name != "none":
            raise ConfigError(
                f"unknown site {name!r} - at `$.capture.sites`; sites: {', '.join(SITES)}; "
                f"groups: {', '.join(GROUPS)}, none"
            )
    return tuple(site for site in SITES if site in chosen)
