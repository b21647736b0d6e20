"""`LacewingConfig`: transformers quantizes on load, saves, and loads again."""

from __future__ import annotations

import pytest
from tiny_transformers import ARCHITECTURES, logits, packed_layers, prompt, tiny, torch, twin

from lacewing.nn.huggingface import LacewingConfig


def test_x():
    assert 1
