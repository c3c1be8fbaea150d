"""Runs recipes of ImageNet and COCO at their own image size and holds memory and time against what was told before.

Each recipe is a process of its own, with a stand-in checkpoint: seeded weights, and statistics of BatchNorms from a
pass over calibration images. Its dry run prints plan and forecast for the recipe as it stands. Then it is run with few
images and iterations: its peak of memory should stay within the plan, the imports and the model, and its reconstruction
take the time that is forecast when the first unit is done. Images are those below ``MMBRECQ_DATA``.

    python benchmarks/scale.py
    python benchmarks/scale.py --only resnet50 retinanet --images 12 --iterations 4 --work-dir work_dirs/scale
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from coverage import enliven
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmbrecq.byte_size import parse_bytes, show_bytes
from mmbrecq.data import build_calibration_set
from mmbrecq.data.groups import grouped
from mmbrecq.data.images import collect_images
from mmbrecq.report.rows import format_seconds
from mmbrecq.report.summary import Summary
from mmbrecq.schema import load_json

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get('MMBRECQ_DATA', ROOT.parent / 'shared/data')).resolve()
RECIPES = (
    'resnet/brecq_w4a4_resnet18_in1k', 'resnet/brecq_w4a4_resnet50_in1k', 'mobilenetv2/brecq_w4a4_mobilenetv2_in1k',
    'regnet/brecq_w4a4_regnetx-3.2gf_in1k', 'vgg/brecq_w4a4_vgg16_in1k', 'vgg/brecq_w4a4_vgg19bn_in1k',
    'retinanet/brecq_w4a8_retinanet-r50_coco', 'fcos/brecq_w4a8_fcos-r50_coco',
    'faster_rcnn/brecq_w4a8_faster-rcnn-r50_coco', 'mask_rcnn/brecq_w4a8_mask-rcnn-r50_coco',
    'yolox/brecq_w4a8_yolox-s_coco', 'ssd/brecq_w4a8_ssdlite-mobilenetv2_coco',
)  # fmt: skip
HEAD = ('recipe', 'images', 'cached', 'work', 'whole recipe', 'images', 'iterations', 'planned', 'peak', 'of it',
        'seconds', 'forecast', 'of it')  # fmt: skip
SECONDS = {'s': 1, 'min': 60, 'h': 3600}
IMPORTS = 0.75e9
"""Bytes that a process has taken when all is imported, see accuracy.py."""


@dataclass
class Told:
    """Holds what the lines of a run say of memory and time."""

    place: str
    cached: int
    working: int
    seconds: float | None

    @classmethod
    def read(cls, text: str, left: str) -> Told:
        """Reads the plan, and the time in front of or behind the words ``left``."""
        plan = re.search(r'cached on the (\w+) in \w+: ([\d.]+ \w+) at most, .*?work takes ([\d.]+ \w+),', text)
        if plan is None:
            raise SystemExit(f'expected the plan of memory, but got: {text.strip()[-300:]}')
        found = re.search(left, text)
        times = re.findall(r'([\d.]+) (s|min|h)\b', found[1]) if found else []
        cached, working = (0 if part == '0 B' else parse_bytes(part, 'the plan') for part in plan.group(2, 3))
        return cls(plan[1], cached, working, sum(float(count) * SECONDS[unit] for count, unit in times) or None)


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='WORD', help='recipes with one of these words in their names')
    parser.add_argument('--images', type=int, default=16, help='calibration images of the short run')
    parser.add_argument('--iterations', type=int, default=8, help='iterations of a unit in the short run')
    parser.add_argument('--threads', type=int, help='passed on to tools/ptq.py')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/scale'))
    return parser.parse_args()


def stand_in(recipe: str, folder: Path) -> Path:
    """Writes a config with the recipe's model and images that are here, and its checkpoint; returns the config."""
    folder.mkdir(parents=True, exist_ok=True)
    path, checkpoint = folder / f'{Path(recipe).name}.py', folder / 'float.pth'
    lines = [f'_base_ = [{str(ROOT / "configs/brecq" / f"{recipe}.py")!r}]', f'float_checkpoint = {str(checkpoint)!r}']
    if recipe.endswith('_coco'):
        root = f'{DATA / "coco128"}/'
        for name, part in (('train', 'train2017'), ('val', 'val2017'), ('test', 'val2017')):
            images = f"data_root={root!r}, ann_file='{part}.json', data_prefix=dict(img='{part}/')"
            lines.append(f'{name}_dataloader = dict(batch_size=1, dataset=dict({images}))')
        lines += [f'{name}_evaluator = dict(ann_file={root + "val2017.json"!r})' for name in ('val', 'test')]
    else:
        root = f'{DATA / "imagenet"}/'
        for name, part in (('train', 'calibration'), ('val', 'val'), ('test', 'val')):
            kind = f"_delete_=True, type='CustomDataset', data_root={root!r}, classes=[str(i) for i in range(1000)]"
            pipeline = f'{{{{_base_.{"train" if name == "train" else "test"}_pipeline}}}}'
            images = f"ann_file='{part}.txt', data_prefix='{part}', pipeline={pipeline}"
            lines.append(f'{name}_dataloader = dict(dataset=dict({kind}, {images}))')
    path.write_text('\n'.join(lines) + '\n')
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    images, _ = collect_images(model, build_calibration_set(cfg, {**cfg.calibration, 'num_samples': 4}))
    enliven(model, grouped(images).parts[0])
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, checkpoint)
    return path


def run(config: Path, folder: Path, *options: str) -> tuple[str, float, int]:
    """Runs tools/ptq.py; returns what it prints, its seconds and its peak of resident bytes."""
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/ptq.py'), str(config), '--work-dir', str(folder)]
    console = folder.with_suffix('.log')
    start = time.perf_counter()
    with console.open('w') as log:
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        process = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    text = console.read_text()
    if status:
        raise SystemExit(f'{config} failed, see {console}; its last words are: {text.strip().rpartition(chr(10))[2]}')
    return text, time.perf_counter() - start, used.ru_maxrss * 1024


def row(recipe: str, args: argparse.Namespace) -> list[str]:
    """A line of the table."""
    folder = args.work_dir.resolve() / Path(recipe).name
    config = stand_in(recipe, folder)
    threads = ['--threads', str(args.threads)] if args.threads else []
    here = DATA / ('coco128/train2017' if recipe.endswith('_coco') else 'imagenet/calibration')
    number = min(Config.fromfile(config).calibration.num_samples, len(list(here.iterdir())))
    options = ['--cfg-options', f'calibration.num_samples={number}']
    text, _, _ = run(config, folder / 'dry', '--dry-run', *threads, *options)
    whole = Told.read(text, r'will take about (.+) on this machine')
    stages = ('weights', 'activations')
    short = [f'reconstructor.{stage}.iterations={args.iterations}' for stage in stages]
    short += [f'reconstructor.{stage}.batch_size={min(args.images, 4)}' for stage in stages]
    options = ['evaluations=[]', 'exporters=[]', f'calibration.num_samples={args.images}', *short]
    text, seconds, peak = run(config, folder / 'short', *threads, '--cfg-options', *options)
    told = Told.read(text, r'about (.+) left')
    summary = load_json(Summary, folder / 'short/summary.json', 'tools/ptq.py')
    planned = IMPORTS + (summary.model_size_bytes.float or 0) + told.working
    planned += told.cached if told.place == 'host' else 0
    first = summary.units[0].seconds if summary.units else 0.0
    took, forecast = summary.seconds.reconstruct or 0.0, (told.seconds or 0.0) + first
    return [
        Path(recipe).name, str(number), f'{show_bytes(whole.cached)} on the {whole.place}',
        show_bytes(whole.working), format_seconds(whole.seconds or 0.0), str(args.images), str(args.iterations),
        show_bytes(round(planned)), show_bytes(peak), f'{peak / planned:.2f}', f'{took:.0f} of {seconds:.0f}',
        f'{forecast:.0f}', f'{took / forecast:.2f}' if forecast else '',
    ]  # fmt: skip


def main() -> None:
    """Prints the table line by line."""
    args = parse_args()
    if not (DATA / 'coco128').is_dir():
        raise SystemExit(f'skipped: there are no images in {DATA}, see MMBRECQ_DATA')
    print(f'| {" | ".join(HEAD)} |\n|{" --- |" * len(HEAD)}')
    for recipe in RECIPES:
        if not args.only or any(word in recipe for word in args.only):
            print(f'| {" | ".join(row(recipe, args))} |', flush=True)


if __name__ == '__main__':
    main()
