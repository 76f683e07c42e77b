"""The verb `train`: finetuning on `transformers.Trainer`."""
