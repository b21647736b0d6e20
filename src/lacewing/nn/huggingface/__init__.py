"""Hugging Face transformers: a model is quantized while it loads, saved, and loaded again.

    config = lacewing.LacewingConfig("w4a8g64")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    model.save_pretrained(packed)
    model = AutoModelForCausalLM.from_pretrained(packed)

Importing this module, `lacewing.LacewingConfig` or `lacewing.nn` makes the method known to
transformers. Raises LacewingError where there is no transformers, or one before 5.0.
"""

from __future__ import annotations

from lacewing.errors import LacewingError

try:
    from lacewing.nn.huggingface.config import LacewingConfig
    from lacewing.nn.huggingface.quantizer import register
except ImportError as error:
    raise LacewingError(
        f"LacewingConfig needs transformers 5.0 or newer: {error}",
        hint="pip install 'transformers>=5'; without it there is lacewing.replace_linear",
    ) from error

__all__ = ["LacewingConfig"]

register()
