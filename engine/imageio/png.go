package imageio

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"image"
	"image/png"
	"io"
	"os"

	"margo/engine"
	"margo/engine/atomicfile"
)

// TextKey is the keyword of the PNG text chunk that carries the sampling
// parameters as JSON.
const TextKey = "parameters"

const pngHeader = 8 + 25 // signature and the IHDR chunk, always first

// WritePNG writes img to path. params, unless nil, is stored as JSON in a text
// chunk: tEXt if it is ASCII, iTXt (UTF-8) otherwise, as the PNG
// specification asks (§11.3.4).
func WritePNG(path string, img *RGB, params any) error {
	rgba := image.NewNRGBA(image.Rect(0, 0, img.W, img.H))
	for i, j := 0, 0; i < len(img.Pix); i, j = i+3, j+4 {
		copy(rgba.Pix[j:j+3], img.Pix[i:i+3])
		rgba.Pix[j+3] = 255 // opaque: the encoder then writes 8-bit RGB
	}
	var chunk []byte
	if params != nil {
		text, err := json.Marshal(params)
		if err != nil {
			return engine.Errorf("write "+path, engine.Internal, "parameters: %w", err)
		}
		chunk = textChunk(TextKey, text)
	}
	f, err := atomicfile.Create(path)
	if err != nil {
		return err
	}
	defer f.Abort()
	w := bufio.NewWriterSize(f, 1<<16)
	if err := png.Encode(&inserter{w, pngHeader, chunk}, rgba); err != nil {
		if errors.Is(err, atomicfile.ErrWrite) {
			return err
		}
		return engine.Errorf("write "+path, engine.Invalid, "%w", err) // no such size
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return f.Commit()
}

// inserter passes on what is written, with chunk put in after the next at
// bytes.
type inserter struct {
	w     io.Writer
	at    int
	chunk []byte
}

func (s *inserter) Write(p []byte) (n int, err error) {
	if s.chunk != nil && len(p) >= s.at {
		if n, err = s.w.Write(p[:s.at]); err != nil {
			return n, err
		}
		if _, err = s.w.Write(s.chunk); err != nil {
			return n, err
		}
		p, s.chunk = p[n:], nil
	}
	s.at -= len(p)
	m, err := s.w.Write(p)
	return n + m, err
}

func textChunk(key string, text []byte) []byte {
	kind, body := "tEXt", append([]byte(key), 0)
	for _, c := range text {
		if c >= 0x80 {
			// compression flag and method, language tag, translated keyword: none
			kind, body = "iTXt", append(body, 0, 0, 0, 0)
			break
		}
	}
	body = append(body, text...)
	c := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	c = append(append(c, kind...), body...)
	return binary.BigEndian.AppendUint32(c, crc32.ChecksumIEEE(c[4:]))
}

// ReadText returns the JSON that WritePNG stored, nil if the PNG has none.
func ReadText(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, engine.Errorf("read "+path, engine.IO, "%w", pathCause(err))
	}
	text, err := findText(data)
	if err != nil {
		return nil, engine.Errorf("read "+path, engine.IO, "%w", err)
	}
	return text, nil
}

func findText(data []byte) ([]byte, error) {
	if len(data) < pngHeader || string(data[:8]) != "\x89PNG\r\n\x1a\n" {
		return nil, errNotPNG
	}
	for b := data[8:]; len(b) >= 12; {
		n := uint64(binary.BigEndian.Uint32(b))
		if n > uint64(len(b)-12) {
			return nil, errCutPNG
		}
		kind, body := string(b[4:8]), b[8:8+n]
		if rest, ok := bytes.CutPrefix(body, append([]byte(TextKey), 0)); ok {
			switch {
			case kind == "tEXt":
				return rest, nil
			case kind == "iTXt" && len(rest) >= 4 && string(rest[:4]) == "\x00\x00\x00\x00":
				return rest[4:], nil
			}
		}
		if kind == "IEND" {
			return nil, nil
		}
		b = b[12+n:]
	}
	return nil, errCutPNG
}
