"""How other libraries store what they quantize: the layouts of their folders, read and written."""
