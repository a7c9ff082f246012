"""Draw what a checkpoint sees in an image: features, attention from a point, predictions.

Writes PNGs, and a page to click in: where each stage and each head looks from there.

Example:
    python tools/analysis_tools/visualize.py configs/demo_fpn_pvt_t.py iter_600.pth street.jpg
"""

import argparse
from pathlib import Path

from pvt_mm import cli
from pvt_mm.apis.inference import Predictor, read_pixels
from pvt_mm.config import load_config
from pvt_mm.visualization import pictures
from pvt_mm.visualization.page import write_page


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmdet or mmseg kind, with a PVT')
    parser.add_argument('checkpoint', help='weights of the whole model: a file or URL')
    parser.add_argument('image', metavar='IMAGE', help='image file')
    parser.add_argument('--out-dir', default='outputs', help='results go here (default: outputs)')
    parser.add_argument(
        '--query',
        metavar='X,Y',
        help="the point, in the image's pixels, whose attention is drawn (default: the middle)",
    )
    parser.add_argument(
        '--ann-file',
        metavar='JSON',
        help="COCO annotations of the image (default: found in the config's data by its name)",
    )
    parser.add_argument('--data-root', metavar='DIR', help='where the data set lies, if elsewhere')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='draw boxes above it (default: 0.3)'
    )
    parser.add_argument('--device', help='cpu or cuda:N (default: the first GPU, else the CPU)')
    cli.add_config_options(parser)
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.data_root)
    point = pictures.parse_point(args.query, read_pixels(args.image))
    predictor = Predictor(cfg, args.checkpoint, args.device)
    view = pictures.view_image(predictor, args.image)
    truth = pictures.find_truth(cfg, args.image, args.ann_file)
    result = predictor(args.image)

    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (name,) = cli.unique_names([args.image])
    features, attention, predictions = (
        out_dir / f'{name}_{kind}.png' for kind in ('features', 'attention', 'predictions')
    )
    page = out_dir / f'{name}.html'
    pictures.plot_features(view, features)
    pictures.plot_attention(view, point, attention)
    pictures.plot_predictions(predictor, view.pixels, result, truth, predictions, args.score_thr)
    drawn = {'Predictions': predictions, 'Features of the stages': features}
    write_page(view, point, drawn, page)
    print(f'{args.image}: {predictor.summary(predictor.as_json(result, args.score_thr))}')
    if truth is None:
        print("no ground truth: the config's data has none of this image; give it by --ann-file")
    print(*(f'wrote {file}' for file in (features, attention, predictions, page)), sep='\n')


if __name__ == '__main__':
    main()
