"""The quantized graph on disk: `write` makes it, `read_back` compares it with what was decided.

`possible` refuses beforehand what cannot be written; `embedding` and `embedding_forms` quantize the token
table; `finish` sets the width of the KV cache and the file's format. The other nodes: `backends`.
"""
