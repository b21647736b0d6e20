"""The KV cache as the engine and PyTorch models share it.

`choice` reads `kv=`, `layout` plans the stores of blocks that it takes, `blocks` owns the blocks,
`memory` tells what memory there is.
"""
