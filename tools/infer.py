"""Run a checkpoint on images: pictures with the results drawn in, and a JSON file beside each.

Example:
    python tools/infer.py configs/retinanet_pvt_s_fpn_1x_coco.py epoch_12.pth street.jpg shots/
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pvt_mm import cli
from pvt_mm.apis.inference import Predictor, find_images
from pvt_mm.config import load_config
from pvt_mm.errors import UserError


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
    pictures = [out_dir / f'{name}.png' for name in cli.unique_names(images)]
    refuse_to_overwrite(images, pictures)
    out_dir.mkdir(parents=True, exist_ok=True)
    failed = []
    for image, picture in zip(images, pictures):
        try:
            result = predictor(image)
        except UserError as error:
            failed.append(str(error))
            continue
        predictor.draw(image, result, picture, args.score_thr)
        report = {'image': image, **predictor.as_json(result, args.score_thr)}
        picture.with_suffix('.json').write_text(json.dumps(report, indent=1, ensure_ascii=False))
        print(f'{image}: {predictor.summary(report)} -> {picture}')
    if failed:
        done = f' The other {len(images) - len(failed)} images are done.' * (len(images) > 1)
        more = f' And {len(failed) - 5} more like these.' * (len(failed) > 5)
        raise UserError(' '.join(failed[:5]) + more + done)


def refuse_to_overwrite(images: Sequence[str], pictures: Sequence[Path]) -> None:
    """Refuse to write a result over an image.

    Raises:
        UserError: Naming the image.
    """
    results = {picture.resolve() for picture in pictures}
    for image in images:
        if Path(image).resolve() in results:
            raise UserError(f'The results would overwrite {image}; give another --out-dir.')


if __name__ == '__main__':
    main()
