"""Integer codes of weights without gradients, one algorithm a file: `rtn`, `hqq`, `gptq`, `awq`.

`codes` is what all of them give, and how it is stored (`codes_parts`: block by block); `weight_only` runs
an algorithm over a whole model.
"""
