"""Answer like `ffprobe -show_streams -of json FILE`, for PCM WAV files alone.

A stand-in for GPU machines without ffmpeg (see gpu.py): musdb asks ffprobe for the length of
every file that it lists. It uses nothing but the standard library, because it is called often.
"""

import json
import sys
import wave


def probe(path: str) -> dict:
    """The fields that musdb reads; numbers are text where ffprobe writes text."""
    with wave.open(path) as file:
        rate, samples, channels = file.getframerate(), file.getnframes(), file.getnchannels()
    stream = {"index": 0, "codec_type": "audio", "channels": channels, "sample_rate": str(rate)}
    return {"streams": [stream | {"duration_ts": samples, "duration": str(samples / rate)}]}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[-1])))
