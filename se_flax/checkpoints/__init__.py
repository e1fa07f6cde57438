"""Checkpoints: from files and the hub to variables, and back.

- `pretrained`: load and save; `resolve`: from a name to a file and a network; `hub`
- `files`, `formats`, `orbax`, `array_file`: readers for untrusted files
- `torch`, `keras`, `keras_files`, `names`, `prefix`: other libraries' names; `convert`: strict import
- `description`, `model_json`: metadata
"""
