"""What other libraries need to know about bigkernels, one module a library. Import the one that you use.

Nothing in bigkernels imports these, but for `quantize`, `dequantize` and `LoRALinear.add_to`, which tell a model of
transformers what it holds, so that it can be saved, and `load_quantized` and `save_quantized`, which are here.
"""
