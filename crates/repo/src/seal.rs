//! Encryption of stored bytes: AES-256-GCM under a key used for one pack or one
//! small object only.
//!
//! Each pack and each small object draws a salt of 32 bytes, and its key is
//! derived from the seal key and that salt. Nonces therefore only have to be
//! unique within one pack, and an offset within it is.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};
use zeroize::Zeroizing;

use crate::error::Flaw;

/// What bytes are sealed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cipher {
    None,
    Aes256Gcm,
}

pub(crate) const TAG_LEN: usize = 16;
pub(crate) const SALT_LEN: usize = 32;
pub(crate) type Salt = [u8; SALT_LEN];

impl Cipher {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Aes256Gcm => 1,
        }
    }

    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::Aes256Gcm),
            _ => None,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Aes256Gcm => "aes-256-gcm",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::None, Self::Aes256Gcm]
            .into_iter()
            .find(|cipher| cipher.name() == name)
    }

    /// Returns how much longer sealed bytes are.
    pub(crate) const fn overhead(self) -> usize {
        match self {
            Self::None => 0,
            Self::Aes256Gcm => TAG_LEN,
        }
    }
}

/// The repository's key that all keys of packs and objects are derived from.
pub(crate) struct SealKey(pub(crate) Zeroizing<[u8; 32]>);

/// Seals and opens the parts of one pack or one object.
pub(crate) struct Sealer {
    key: Option<LessSafeKey>,
}

impl Sealer {
    /// For records of the pack with this salt.
    pub(crate) fn for_pack(seal: Option<&SealKey>, salt: &Salt) -> Self {
        Self::derive("highwater 1 pack key", seal, salt)
    }

    /// For the small object with this salt.
    pub(crate) fn for_object(seal: Option<&SealKey>, salt: &Salt) -> Self {
        Self::derive("highwater 1 object key", seal, salt)
    }

    fn derive(context: &str, seal: Option<&SealKey>, salt: &Salt) -> Self {
        let key = seal.map(|SealKey(key)| {
            let mut hasher = blake3::Hasher::new_derive_key(context);
            hasher.update(key.as_slice());
            hasher.update(salt);
            let derived = Zeroizing::new(*hasher.finalize().as_bytes());
            aead_key(&derived)
        });
        Self { key }
    }

    pub(crate) fn cipher(&self) -> Cipher {
        if self.key.is_some() {
            Cipher::Aes256Gcm
        } else {
            Cipher::None
        }
    }

    /// Encrypts `plain` in place and returns the tag that follows it; `None`
    /// without encryption.
    pub(crate) fn seal(&self, nonce: u64, aad: &[u8], plain: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        let key = self.key.as_ref()?;
        let tag = key
            .seal_in_place_separate_tag(nonce_of(nonce), Aad::from(aad), plain)
            .expect("AES-GCM takes more bytes than any of our buffers has");
        Some(
            tag.as_ref()
                .try_into()
                .expect("the tag of AES-GCM has 16 bytes"),
        )
    }

    /// Decrypts `sealed` in place and returns the plain part of it.
    pub(crate) fn open<'a>(
        &self,
        nonce: u64,
        aad: &[u8],
        sealed: &'a mut [u8],
    ) -> Result<&'a [u8], Flaw> {
        let Some(key) = &self.key else {
            return Ok(sealed);
        };
        let body = sealed
            .len()
            .checked_sub(TAG_LEN)
            .ok_or(Flaw("it is shorter than its tag"))?;
        let (text, tag) = sealed.split_at_mut(body);
        let tag = Tag::try_from(&*tag).map_err(|_| Flaw("its tag has a wrong length"))?;
        key.open_in_place_separate_tag(nonce_of(nonce), Aad::from(aad), tag, text, 0..)
            .map(|plain| &*plain)
            .map_err(|_| Flaw("it was changed, or belongs somewhere else"))
    }
}

/// Wraps and unwraps the repository's keys under a key made from a secret.
pub(crate) fn aead_key(key: &[u8; 32]) -> LessSafeKey {
    let unbound = UnboundKey::new(&AES_256_GCM, key).expect("AES-256 keys have 32 bytes");
    LessSafeKey::new(unbound)
}

fn nonce_of(value: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes
        .iter_mut()
        .rev()
        .zip(value.to_le_bytes())
        .for_each(|(to, from)| *to = from);
    Nonce::assume_unique_for_key(bytes)
}

/// Draws random bytes from the operating system.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system's random generator works");
    bytes
}
