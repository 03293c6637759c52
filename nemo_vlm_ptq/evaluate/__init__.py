"""Questions answered by a model, scored, and compared with the 16-bit model; pure arithmetic."""
