"""The rules, in the order in which they are tried. A new rule is one file and one entry here."""

from . import (
    add_norm,
    attention_interface,
    attention_mask,
    attention_multihead,
    attention_sdpa,
    conv,
    conv_norm,
    glu,
    image_norm,
    image_sequence,
    linear,
    linear_cross_entropy,
    loss,
    mlp,
    norm,
    rope,
)

# A module rule replaces a module's whole forward; it goes first, because source rules ask what it decided.
MODULE_RULES = (
    norm.RULE,
    image_norm.MODULE_RULE,
    image_sequence.RULE,
    linear.RULE,
    conv.RULE,
    attention_multihead.RULE,
    loss.MODULE_RULE,
    loss.FUNCTION_RULE,
)
SOURCE_RULES = (
    add_norm.RULE,
    glu.RULE,
    mlp.RULE,
    image_norm.RULE,
    conv_norm.RULE,
    rope.RULE,
    attention_interface.RULE,
    attention_mask.RULE,
    attention_sdpa.RULE,
    loss.SOURCE_RULE,
    linear_cross_entropy.RULE,
)
