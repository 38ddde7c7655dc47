"""What share of a TPU's peak each kernel reaches by the compiler's static cycles, as `benchmarks/kernel_shares.py` finds them."""

SHARES: dict[str, dict[str, dict[int, float]]] = {
    "v5e": {
        "attention_forward": {64: 0.3962, 128: 0.7346, 256: 0.8166},
        "attention_gradients": {64: 0.5196, 128: 0.9176, 256: 0.9417},
        "cross_entropy_forward": {0: 0.9097},
        "decay_and_add_backward": {128: 0.3259},
        "decay_and_add_by_channel_backward": {128: 0.1404},
        "decay_and_add_by_channel_forward": {128: 0.1789},
        "decay_and_add_forward": {128: 0.3834},
        "erase_and_write_backward": {128: 0.1564, 256: 0.2288},
        "erase_and_write_by_channel_backward": {128: 0.0548},
        "erase_and_write_by_channel_forward": {128: 0.0753},
        "erase_and_write_forward": {128: 0.1607, 256: 0.2761},
        "selected_attention_forward": {128: 0.6370},
        "short_conv_backward": {0: 0.0104},
        "short_conv_forward": {0: 0.0083},
    },
}
