"""Files and the hub, to variables and back.

- `pretrained`: load and save; `resolve`: from a name to a file and a network; `hub`
- `files`, `formats`, `orbax`, `array_file`: readers that trust no file
- `torch`, `keras`, `keras_files`, `names`, `prefix`: other libraries' names; `convert`: strict import
- `description`, `model_json`: what belongs to arrays and is not in them
"""
