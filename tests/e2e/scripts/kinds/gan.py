"""A DCGAN in the usual shape: the discriminator on real and generated images, then the generator."""

import torch
from torch import nn

torch.manual_seed(999)
generator = nn.Sequential(
    nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Tanh()
)
discriminator = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4), nn.Flatten())
criterion = nn.BCEWithLogitsLoss()
optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
images = torch.rand(64, 1, 8, 8) * 2 - 1
ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)

for epoch in range(6):
    for real in torch.utils.data.DataLoader(images, batch_size=16, shuffle=True):
        discriminator.zero_grad()
        loss_real = criterion(discriminator(real), ones)
        loss_real.backward()
        fake = generator(torch.randn(16, 8, 1, 1))
        loss_fake = criterion(discriminator(fake.detach()), zeros)
        loss_fake.backward()
        optimizer_d.step()

        generator.zero_grad()
        loss_g = criterion(discriminator(fake), ones)
        loss_g.backward()
        optimizer_g.step()
        print(f"Loss_D: {(loss_real + loss_fake).item()!r} Loss_G: {loss_g.item()!r}")
torch.save({"netG": generator.state_dict(), "netD": discriminator.state_dict()}, "checkpoint.pt")
