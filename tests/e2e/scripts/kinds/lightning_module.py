"""PyTorch Lightning: accumulation, clipping, a scheduler, validation, a checkpoint."""

import logging

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class LitClassifier(L.LightningModule):
    def __init__(self, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        print("train_loss", repr(loss.item()))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean(), on_epoch=True)

    def on_validation_epoch_end(self):
        print("val_acc:", self.trainer.callback_metrics.get("val_acc", torch.tensor(0.0)).item())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]


L.seed_everything(7, verbose=False)
x = torch.randn(320, 20)
y = (x.sum(1) > 0).long()
model = LitClassifier()
trainer = L.Trainer(
    max_epochs=3, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
)  # fmt: skip
trainer.fit(
    model,
    DataLoader(TensorDataset(x[:256], y[:256]), 16, shuffle=True),
    DataLoader(TensorDataset(x[256:], y[256:]), 32),
)
trainer.save_checkpoint("checkpoint.pt")
