"""Which release of mmdet or mmseg is the first to have a part, by the names each registers."""

from __future__ import annotations

#: What mmdet 3.0.0 and mmsegmentation 1.0.0 have not; the maintained fork has all before it too.
_ADDED = {
    'mmdet': {
        'mmdet 3.1.0': """
            ADE20KInstanceDataset ADE20KPanopticDataset ADE20KSegDataset ATSSVLFusionHead
            AppearanceFreeLink BaseFrameSample BaseMOTModel BaseReID BaseSegDataset BaseVideoDataset
            BertModel ByteTrack ByteTracker COCOCaptionMetric CameraMotionCompensation
            CocoCaptionDataset CocoSegDataset CocoVideoMetric DSDLDetDataset DeepSORT
            DeltaXYWHBBoxCoderForGLIP EQLV2Loss FcModule FixScaleResize GLIP GlobalAveragePooling
            InterpolateTracklets KalmanFilter L2Loss LinearReIDHead LoadTrackAnnotations
            MOTChallengeDataset MOTChallengeMetric MarginL2Loss Mask2FormerTrackHead
            Mask2FormerVideo MaskTrackRCNN MaskTrackRCNNTracker MultiPosCrossEntropyLoss OCSORT
            OCSORTTracker PackReIDInputs PackTrackInputs QDTrack QuasiDenseEmbedHead
            QuasiDenseTrackHead QuasiDenseTracker ReIDDataPreprocessor ReIDDataset ReIDMetrics
            RefCocoDataset RefSegMetric ResizeShortestEdge RoIEmbedHead RoITrackHead SIoULoss
            SORTTracker SemSegMetric SinePositionalEncoding3D StrongSORT StrongSORTTracker
            TrackAspectRatioBatchSampler TrackDataPreprocessor TrackImgSampler TrackLocalVisualizer
            TrackVisualizationHook TripletLoss UniformRefFrameSample YouTubeVISDataset
            YouTubeVISMetric iSAIDDataset
        """,
        'mmdet 3.2.0': """
            BboxOverlaps2D_GLIP BinaryFocalLossCost ConcatDataset CrossEntropyCustomLoss DDQDETR
            DDQDETRHead FPN_DropBlock FocalCustomLoss FrozenBN GTBoxSubOne_GLIP GroundingDINO
            GroundingDINOHead MultiDataAspectRatioBatchSampler MultiDataSampler RandomFlip_GLIP
            TopkHungarianAssigner V3DetDataset
        """,
        'mmdet 3.3.0': """
            CustomSampleSizeSampler DODCocoMetric DODDataset DumpODVGResults Flickr30kDataset
            Flickr30kMetric GroundingVisualizationHook LVISFixedAPMetric LoadTextAnnotations
            MDETRStyleRefCocoDataset MultiDatasetsEvaluator ODVGDataset OVCocoMetric
            RandomSamplingNegPos RefExpMetric gRefCOCOMetric
        """,
        'onedl-mmdetection 3.5.1': """
            CLRFPN CLRHead CLRNet CULaneMetric FasterCocoMetric ImageAug LineDetDataProcessor
            LinesToArray LoadLineAnnotations LoadOneDLSegmentation OneDLDataset
            OneDLLineInstancesDatasetAdapter PackLineDetectionInputs
            TrainAugmentDetVisualizationHook
        """,
    },
    'mmseg': {
        'mmsegmentation 1.1.0': """
            Albu BaseCDDataset ConcatCDInput DDRHead DDRNet DSDLSegDataset HuasdorffDisstanceLoss
            LEVIRCDDataset LoadMultipleRSImageFromFile LoadSingleRSImageFromFile
        """,
        'mmsegmentation 1.1.1': """
            BDD100KDataset
        """,
        'mmsegmentation 1.1.2': """
            DepthEstimator DepthMetric ForceDefaultOptimWrapperConstructor
            LoadDepthAnnotation NYUDataset PolyLRRatio RandomDepthMix RandomFlip Resize SiLogLoss
            VPD VPDDepthHead
        """,
        'mmsegmentation 1.2.0': """
            CLIPTextEncoder ClassificationCost CrossEntropyLossCost DiceCost HungarianAssigner
            MultimodalEncoderDecoder QuickGELU SideAdapterCLIPHead
        """,
        'onedl-mmsegmentation 1.4.2': """
            HSIDrive20Dataset LoadImageFromNpyFile LoadOneDLAnnotations OneDLDataset
        """,
    },
}


def first_with(package: str, name: str) -> str | None:
    """Return the first release that registers a name, such as ``'mmdet 3.2.0'``, if it is known."""
    for release, names in _ADDED[package].items():
        if name in names.split():
            return release
    return None
