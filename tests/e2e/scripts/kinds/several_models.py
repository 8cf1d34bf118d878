"""Encoder and decoder as modules of their own, each with its optimizer; both step for one loss."""

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)

    def forward(self, tokens):
        return self.gru(self.embedding(tokens))[1]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.out = nn.Linear(16, 20)

    def forward(self, tokens, hidden):
        return self.out(self.gru(self.embedding(tokens), hidden)[0])


torch.manual_seed(0)
pairs = torch.randint(1, 20, (64, 6))
encoder, decoder = Encoder(), Decoder()
optimizers = [torch.optim.Adam(module.parameters(), lr=1e-2) for module in (encoder, decoder)]
for epoch in range(3):
    for batch in torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits = decoder(torch.cat([torch.zeros_like(batch[:, :1]), batch[:, :-1]], 1), encoder(batch))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        print(repr(loss.item()))
torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, "checkpoint.pt")
