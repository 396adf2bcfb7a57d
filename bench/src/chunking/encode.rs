//! One frame: compressed, sealed, and back.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, InBuffer, OutBuffer};

use crate::workload::BLOCK;

/// How hard zstd tries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Level {
    Plain,
    Fixed(i32),
    /// Level 1; level 3 as well where level 1 saved a tenth.
    Both,
    /// Level 3 where it saves 3 % more than level 1 on the first 16 KiB, else level 1.
    Sampled,
}

/// How data that will not shrink is told before zstd sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Early {
    Never,
    /// The bytes of a sample are spread like noise: what the product does.
    Sample,
    /// zstd at level 1 shrinks none of four samples of 4 KiB.
    Trial,
}

/// A frame as it is stored.
pub struct Frame {
    pub sealed: Vec<u8>,
    pub is_zstd: bool,
    /// Plain bytes of each piece.
    pub lengths: Vec<u32>,
}

/// What a frame costs in a pack besides the sealed bytes: header, and filling up to a multiple of 64.
pub fn stored(sealed: usize) -> u64 {
    (sealed as u64 + 32).next_multiple_of(64)
}

fn fault(code: usize) -> String {
    zstd::zstd_safe::get_error_name(code).to_owned()
}

fn key() -> Result<LessSafeKey, String> {
    UnboundKey::new(&AES_256_GCM, &[7; 32]).map(LessSafeKey::new).map_err(|_| "no AES-256-GCM".to_owned())
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([1; 12])
}

pub struct Encoder {
    one: CCtx<'static>,
    chosen: CCtx<'static>,
    level: Level,
    early: Early,
    key: LessSafeKey,
}

impl Encoder {
    pub fn new(level: Level, early: Early, dictionary: &[u8]) -> Result<Encoder, String> {
        let context = |level: i32| {
            let mut context = CCtx::create();
            context.set_parameter(CParameter::CompressionLevel(level)).map_err(fault)?;
            if !dictionary.is_empty() {
                context.load_dictionary(dictionary).map_err(fault)?;
            }
            Ok::<_, String>(context)
        };
        let chosen = if let Level::Fixed(level) = level { level } else { 3 };
        Ok(Encoder { one: context(1)?, chosen: context(chosen)?, level, early, key: key()? })
    }

    fn squeeze(context: &mut CCtx<'static>, plain: &[u8]) -> Result<Vec<u8>, String> {
        let mut out = Vec::with_capacity(zstd::zstd_safe::compress_bound(plain.len()));
        context.compress2(&mut out, plain).map_err(fault)?;
        Ok(out)
    }

    /// Whether the early test says that `plain` will not shrink.
    pub fn is_noise(&mut self, plain: &[u8]) -> bool {
        match self.early {
            Early::Never => false,
            Early::Sample => model::noise::is_noise(plain),
            Early::Trial => {
                let step = plain.len() / 4;
                (0..4).all(|quarter| {
                    let part = &plain[quarter * step..(quarter * step + 4096).min(plain.len())];
                    Encoder::squeeze(&mut self.one, part)
                        .is_ok_and(|small| small.len() >= part.len() * 97 / 100)
                })
            }
        }
    }

    fn compressed(&mut self, plain: &[u8]) -> Result<Option<Vec<u8>>, String> {
        let limit = plain.len() / 100 * 97;
        if self.level == Level::Plain || self.is_noise(plain) {
            return Ok(None);
        }
        let small = match self.level {
            Level::Both => {
                let first = Encoder::squeeze(&mut self.one, plain)?;
                if first.len() < plain.len() / 10 * 9 {
                    Encoder::squeeze(&mut self.chosen, plain)?
                } else {
                    first
                }
            }
            Level::Sampled => {
                let part = &plain[..plain.len().min(16_384)];
                let first = Encoder::squeeze(&mut self.one, part)?.len();
                let third = Encoder::squeeze(&mut self.chosen, part)?.len();
                let context = if third * 100 < first * 97 { &mut self.chosen } else { &mut self.one };
                Encoder::squeeze(context, plain)?
            }
            _ => Encoder::squeeze(&mut self.chosen, plain)?,
        };
        Ok((small.len() < limit).then_some(small))
    }

    fn seal(&self, mut bytes: Vec<u8>, is_zstd: bool, lengths: Vec<u32>) -> Result<Frame, String> {
        self.key
            .seal_in_place_append_tag(nonce(), Aad::empty(), &mut bytes)
            .map_err(|_| "cannot seal".to_owned())?;
        Ok(Frame { sealed: bytes, is_zstd, lengths })
    }

    pub fn frame(&mut self, plain: Vec<u8>, lengths: Vec<u32>) -> Result<Frame, String> {
        match self.compressed(&plain)? {
            Some(small) => self.seal(small, true, lengths),
            None => self.seal(plain, false, lengths),
        }
    }

    /// `plain` as what is different from `base`.
    pub fn patch(&mut self, base: &[u8], plain: &[u8]) -> Result<Frame, String> {
        let mut context = CCtx::create();
        context.set_parameter(CParameter::CompressionLevel(3)).map_err(fault)?;
        context.ref_prefix(base).map_err(fault)?;
        let mut out = Vec::with_capacity(zstd::zstd_safe::compress_bound(plain.len()));
        context.compress2(&mut out, plain).map_err(fault)?;
        self.seal(out, true, vec![plain.len() as u32])
    }
}

pub struct Decoder {
    context: DCtx<'static>,
    key: LessSafeKey,
}

impl Decoder {
    pub fn new(dictionary: &[u8]) -> Result<Decoder, String> {
        let mut context = DCtx::create();
        if !dictionary.is_empty() {
            context.load_dictionary(dictionary).map_err(fault)?;
        }
        Ok(Decoder { context, key: key()? })
    }

    /// The first `wanted` plain bytes of a frame.
    pub fn open(&mut self, frame: &Frame, wanted: usize) -> Result<Vec<u8>, String> {
        let mut bytes = frame.sealed.clone();
        let opened = self
            .key
            .open_in_place(nonce(), Aad::empty(), &mut bytes)
            .map_err(|_| "cannot open what was sealed".to_owned())?;
        if !frame.is_zstd {
            return Ok(opened[..wanted].to_vec());
        }
        let whole: usize = frame.lengths.iter().map(|&length| length as usize).sum();
        let mut plain = Vec::with_capacity(wanted);
        if wanted == whole {
            self.context.decompress(&mut plain, opened).map_err(fault)?;
            return Ok(plain);
        }
        self.context.reset(zstd::zstd_safe::ResetDirective::SessionOnly).map_err(fault)?;
        let mut input = InBuffer::around(opened);
        let mut output = OutBuffer::around(&mut plain);
        while output.pos() < wanted {
            let before = (input.pos(), output.pos());
            self.context.decompress_stream(&mut output, &mut input).map_err(fault)?;
            if before == (input.pos(), output.pos()) {
                return Err("a frame ends too early".to_owned());
            }
        }
        Ok(plain)
    }

    pub fn patched(&mut self, base: &[u8], frame: &Frame) -> Result<Vec<u8>, String> {
        let mut bytes = frame.sealed.clone();
        let opened = self
            .key
            .open_in_place(nonce(), Aad::empty(), &mut bytes)
            .map_err(|_| "cannot open what was sealed".to_owned())?;
        let mut context = DCtx::create();
        context.ref_prefix(base).map_err(fault)?;
        let mut plain = Vec::with_capacity(BLOCK);
        context.decompress(&mut plain, opened).map_err(fault)?;
        Ok(plain)
    }
}
