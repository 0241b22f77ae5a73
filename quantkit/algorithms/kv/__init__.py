"""KV-cache policies: which token gets which precision, and how a page is quantized. Functions on tensors."""
