"""FiBiNET (Huang et al. 2019) on Frappe, the log of a recommender of apps: 10 categorical fields, no numbers.

Command:   python -m train --config=configs/ctr_frappe.py --workdir=runs/frappe
           python -m train --config=configs/ctr_frappe.py:fm --workdir=runs/frappe-fm
Data:      libsvm-like files `label id:1 id:1 ...`: train.libsvm, valid.libsvm and test.libsvm in data/frappe, as the
           AFN paper's authors publish them (WeiyuCheng/AFN-AAAI-20). Or an npz archive, here one with the 57,722 rows
           of `valid` to train on (a tenth held out to stop by) and the 28,860 of `test`:
               --config.data.train=npz:frappe.npz:valid --config.data.eval= --config.data.test=npz:frappe.npz:test

The argument names the network: `fibinet`, `no_se` (the same without squeeze-and-excitation), `sigmoid` (with the
sigmoid form instead of FiBiNET's), `fm` or `lr`. The paper has no result on Frappe. Embeddings of 10 are its size for
Criteo; the perceptron is smaller than its 3 x 400, as the data is.

Measured:  with the npz archive, seed 0, 2026-11-20, JAX 0.10.2, about a fifth of a busy 2.5 GHz Xeon with 2 cores: AUC
           0.9442 on the test rows after 3 min; 0.9440 without squeeze-and-excitation. Three seeds each and the
           baselines are in docs/ctr.md (python -m benchmarks.ctr). Settings were not tuned.
"""

import dataclasses

from se_flax.errors import UserError, closest
from train.ctr.config import Config, Data, Model, Optim

NETWORKS = {
    "fibinet": Model(hidden=(64, 64)),
    "no_se": Model(hidden=(64, 64), attention="none"),
    "sigmoid": Model(hidden=(64, 64), attention="sigmoid"),
    "fm": Model(name="fm"),
    "lr": Model(name="lr"),
}


def get_config(network: str = "fibinet") -> Config:
    """Settings of the run; the argument names the network."""
    if network not in NETWORKS:
        raise UserError(f"unknown recipe ctr_frappe.py:{network}; {closest(network, NETWORKS)}")
    return Config(
        model=dataclasses.replace(NETWORKS[network]),
        data=Data(
            train="libsvm:data/frappe/train.libsvm",
            eval="libsvm:data/frappe/valid.libsvm",
            test="libsvm:data/frappe/test.libsvm",
            batch_size=1024,
        ),
        # One weight per id needs longer strides than the networks behind embeddings.
        optim=Optim(learning_rate=2e-2 if network == "lr" else 5e-3),
        epochs=30,
    )
