"""The README of the target `hmct`."""

from string import Template

README = Template("""# A mixed precision for HMCT (ONNX PTQ)

$origin- march: $march
- qconfig: $digest

`model.onnx` is the float model, trained weights included, at batch 1. `quant_config.json` gives the dtypes of the
inputs of its nodes; nodes that it does not name are int8. With calibration data as one folder of .npy files for each
input:

```yaml
model_parameters: {onnx_model: model.onnx, march: $march, working_dir: out}
calibration_parameters: {cal_data_dir: calibration, quant_config: quant_config.json}
```

```
hb_compile -c config.yaml
```

`nodes.csv` maps qflow's operators to the nodes, and `export.json` lists fallbacks and what could not be expressed.

HMCT reads `qtype` (and `input0`, `input1`) as the dtypes of a node's inputs, unlike a qconfig, which sets outputs: the
dtype of an operator's result stands at the nodes that read it. The nodes inside one operator take the dtype of the
operator. An fp16 operator is the exception: all its nodes have `qtype` float16, which HMCT computes them in.

Not known: which nodes HMCT merges or renames before it reads the file. It wants the names of
`optimized_float_model.onnx`, which it writes; compare them with `nodes.csv`, and rename in `quant_config.json` where
they differ. An older HMCT writes `InputType0` for `input0`.
""")
