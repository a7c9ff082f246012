"""Run a checkpoint on images: pictures with the results drawn in, and a JSON file beside each.

Example:
    python tools/infer.py configs/retinanet_pvt_s_fpn_1x_coco.py epoch_12.pth street.jpg
"""

import argparse
import json
from pathlib import Path

from pvt_mm import cli
from pvt_mm.apis.inference import Predictor, find_images
from pvt_mm.config import load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmdet or mmseg kind')
    parser.add_argument('checkpoint', help='weights of the whole model: a file or URL')
    parser.add_argument(
        'images',
        nargs='+',
        metavar='IMAGE',
        help="image files, folders of images, or patterns such as 'shots/*.jpg'",
    )
    parser.add_argument('--out-dir', default='outputs', help='results go here (default: outputs)')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='draw and list boxes above it (default: 0.3)'
    )
    parser.add_argument('--device', help='cpu or cuda:N (default: the first GPU, else the CPU)')
    cli.add_config_options(parser)
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    images = find_images(args.images)
    predictor = Predictor(cfg, args.checkpoint, args.device)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, cli.unique_names(images)):
        result = predictor(image)
        picture = out_dir / f'{name}.png'
        predictor.draw(image, result, picture, args.score_thr)
        report = {'image': image, **predictor.as_json(result, args.score_thr)}
        (out_dir / f'{name}.json').write_text(json.dumps(report, indent=1, ensure_ascii=False))
        print(f'{image}: {predictor.summary(report)} -> {picture}')


if __name__ == '__main__':
    main()
