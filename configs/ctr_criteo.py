"""FiBiNET (Huang et al. 2019, sections 4.1 and 4.2) on Criteo's contest data: 13 numeric and 26 categorical fields.

Command:   python -m train --config=configs/ctr_criteo.py --workdir=runs/criteo
           python -m train --config=configs/ctr_criteo.py:sample --config.data.train=csv:few.csv --workdir=runs/few
Data:      data/criteo/train.txt, 45,840,617 lines without a header: label, I1 to I13, C1 to C26, separated by tabs. It
           is read as a stream, once for the vocabularies and once per epoch; a tenth is held out to stop by and a tenth
           to test. `:sample` is for a small CSV file whose first line has the names Label, I1 ... C26.

Paper:     AUC 0.8105 and log loss 0.4421 for the deep network with one matrix per pair (table 4), 0.8098 and 0.4427
           without squeeze-and-excitation (table 6), on 90/10 parts of the same lines. Its settings are those below:
           embeddings of 10, 3 x 400, dropout 0.5, Adam at 1e-4, batches of 1000. Numbers become floor(log(x)^2), as in
           the contest's winning solution; values seen fewer than 10 times share one id.

Measured:  `:sample` on 1,999 lines, 2026-11-20, JAX 0.10.2: AUC 0.677 +- 0.004 over three seeds in under a minute each,
           once compiled; docs/ctr.md has the comparison, and what so few lines cannot show.

The first command was not run by this project: the data is 11 GB. `:sample,<network>` takes the names of networks that
configs/ctr_frappe.py has.
"""

from configs import ctr_frappe
from se_flax.errors import UserError
from train.ctr.config import Config, Data, Model, Optim


def get_config(size: str = "full") -> Config:
    """Settings of the run; the argument is `full`, `sample` or `sample,<network>`."""
    kind, _, network = size.partition(",")
    if kind == "sample":
        return sample(network or "fibinet")
    if size != "full":
        raise UserError(f"unknown recipe ctr_criteo.py:{size}; allowed: full, sample, sample,<network>")
    return Config(
        model=Model(hidden=(400, 400, 400), dropout=0.5),
        data=Data(
            train="csv:data/criteo/train.txt",
            columns="label,I1-I13,C1-C26",
            delimiter="\\t",
            numeric="I1-I13",
            categorical="C1-C26",
            bucketing="log",
            min_count=10,
            eval_fraction=0.1,
            test_fraction=0.1,
            batch_size=1000,
            eval_batch_size=10_000,
        ),
        optim=Optim(learning_rate=1e-4),
        epochs=20,
    )


def sample(network: str) -> Config:
    """A few thousand lines: a small network with one bilinear matrix, few ids, a larger share to test on."""
    config = ctr_frappe.get_config(network)
    config.model.embedding_size = 4
    config.model.bilinear = "all"
    config.data = Data(
        train="csv:data/criteo/sample.csv",
        label="Label",
        numeric="I1-I13",
        categorical="C1-C26",
        bucketing="log",
        encoding="hash",
        hash_buckets=500,
        eval_fraction=0.15,
        test_fraction=0.35,
        batch_size=128,
        eval_batch_size=1000,
    )
    return config
