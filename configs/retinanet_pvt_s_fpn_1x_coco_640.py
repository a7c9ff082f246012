# RetinaNet, PVT-Small, shorter side 640 instead of 800. Reference: box AP 38.7.
_base_ = 'retinanet_pvt_s_fpn_1x_coco.py'
train_pipeline = _base_.train_pipeline
train_pipeline[2]['scale'] = (1333, 640)
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = (1333, 640)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
