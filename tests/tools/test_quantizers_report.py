"""tools/quantizers_report.py after the scripts that scripts/compare_quantizers.sh runs, at small size."""

import numpy as np
import pytest

from autoregressive.train import extract_codes_c2i, train_c2i
from dataset.code_files import ShardFolder
from tests.training import make_images, run_here
from tokenizer.tokenizer_image import vq_train
from tools import quantizers_report
from tools.stages import last_held_out_loss

pytestmark = pytest.mark.slow  # through whole scripts and servers

COMMON = ["--num-workers", 0, "--device", "cpu"]
TRAINING = [*COMMON, "--global-batch-size", 2, "--mixed-precision", "none", "--max-steps", 1, "--log-every", 1]


def test_table_has_a_row_for_each_quantiser(tmp_path):
    images = make_images(tmp_path / "images", classes=2, per_class=2, size=32)
    for file in images.rglob("1.png"):  # is wider
        file.unlink()
    data = ["--data-path", images, "--image-size", 32]
    for name, options in (("lfq", ["--codebook-size", 16]), ("fsq", ["--quantizer-options", '{"levels": [3, 4]}'])):
        run = tmp_path / name
        flags = ["--vq-model", "VQ-8-P", "--quantizer", name, *options, "--perceptual-weight", 0, "--disc-weight", 0]
        run_here(vq_train, *data, *flags, *TRAINING, "--results-dir", run / "tokenizer")
        codes = ["--code-path", run / "codes_train"]
        run_here(extract_codes_c2i, *data, *codes, "--vq-ckpt", run / "tokenizer", "--no-flip", *COMMON)
        flags = ["--gpt-model", "GPT-XS", "--val-code-path", run / "codes_train", "--results-dir", run / "gpt"]
        run_here(train_c2i, *codes, *flags, *TRAINING)
    runs = ["--runs", tmp_path / "lfq", tmp_path / "fsq"]
    run_here(quantizers_report, "--images", images, *runs, "--output", tmp_path)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().splitlines()
    ]
    assert [row[:2] for row in rows[2:]] == [["lfq", "16"], ["fsq", "12"]]
    used = len(np.unique(ShardFolder(tmp_path / "fsq" / "codes_train").rows(np.arange(2), np.zeros(2, int))))
    nats = last_held_out_loss(str(tmp_path / "fsq" / "gpt"))
    assert rows[3][2] == f"{used / 12:.0%}" and rows[3][4:] == [f"{nats:.2f}", f"{16 * nats:.0f}"]
    assert float(rows[3][3]) > 0
