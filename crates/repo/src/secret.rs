//! The repository's keys, wrapped under a passphrase or a key file.

use argon2::{Algorithm, Argon2, Params, Version};
use highwater_model::RepoId;
use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind};
use ring::aead::{Aad, Nonce};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::error::{Flaw, RepoError, RepoErrorKind};
use crate::hash::IdKey;
use crate::seal::{SealKey, aead_key, random};
use crate::wire::{array_from_hex, to_hex};

/// What opens an encrypted repository.
#[derive(Clone)]
pub enum Secret {
    /// A passphrase, as typed.
    Passphrase(Zeroizing<Vec<u8>>),
    /// The bytes of a key file, at least 32.
    KeyFile(Zeroizing<Vec<u8>>),
}

impl Secret {
    /// Returns of which kind it is.
    pub fn kind(&self) -> SecretKind {
        match self {
            Self::Passphrase(_) => SecretKind::Passphrase,
            Self::KeyFile(_) => SecretKind::KeyFile,
        }
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret::{:?}(..)", self.kind())
    }
}

/// The kinds of secrets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SecretKind {
    /// A passphrase.
    Passphrase,
    /// A key file.
    KeyFile,
}

/// The two independent keys of a repository.
pub(crate) struct DataKeys {
    pub(crate) id: Zeroizing<IdKey>,
    pub(crate) seal: SealKey,
}

impl DataKeys {
    pub(crate) fn draw() -> Self {
        Self {
            id: Zeroizing::new(random()),
            seal: SealKey(Zeroizing::new(random())),
        }
    }
}

/// A key object is read whole.
const KEY_LEN_MAX: u64 = 64 << 10;
/// Each costs an argon2 run when a passphrase is tried.
const KEYS_MAX: usize = 64;
const KEY_FILE_LEN_MIN: usize = 32;
const WRAP_CONTEXT: &[u8] = b"highwater 1 key wrap";
const KEY_FILE_CONTEXT: &str = "highwater 1 key file";

/// The second recommended choice of RFC 9106: 64 MiB and three passes; one
/// lane, so that it takes as long here as for somebody who guesses.
const ARGON: Kdf = Kdf::Argon2id {
    memory_kib: 64 << 10,
    passes: 3,
    lanes: 1,
};

/// The JSON of a `keys/<id>` object.
#[derive(Serialize, Deserialize)]
struct Wire {
    version: u32,
    repository: RepoId,
    #[serde(flatten)]
    kdf: Kdf,
    salt: String,
    nonce: String,
    wrapped: String,
}

/// How the wrapping key is made of the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kdf", rename_all = "lowercase")]
enum Kdf {
    /// For passphrases.
    Argon2id {
        memory_kib: u32,
        passes: u32,
        lanes: u32,
    },
    /// For key files, which need no slow hash.
    Blake3,
}

/// From outside: a key object must not make us take all memory ...
const MEMORY_KIB_MAX: u32 = 1 << 20;
const LANES_MAX: u32 = 16;
/// ... or hash for hours: memory times passes, about five seconds.
const WORK_KIB_MAX: u64 = 4 << 20;
/// For all keys together: sixty-four of those that we make.
const WORK_KIB_MAX_TOTAL: u64 = 64 * 3 * (64 << 10);

impl Kdf {
    /// Returns how much memory is written to make the wrapping key.
    fn work_kib(self) -> u64 {
        match self {
            Self::Argon2id {
                memory_kib, passes, ..
            } => u64::from(memory_kib).saturating_mul(passes.into()),
            Self::Blake3 => 0,
        }
    }

    fn is_reasonable(self) -> bool {
        match self {
            Self::Argon2id {
                memory_kib, lanes, ..
            } => {
                memory_kib <= MEMORY_KIB_MAX
                    && lanes <= LANES_MAX
                    && self.work_kib() <= WORK_KIB_MAX
            }
            Self::Blake3 => true,
        }
    }

    fn kind(self) -> SecretKind {
        match self {
            Self::Argon2id { .. } => SecretKind::Passphrase,
            Self::Blake3 => SecretKind::KeyFile,
        }
    }
}

const UNREASONABLE: Flaw = Flaw("a key asks for more work than is reasonable");

/// Stores `keys` wrapped under `secret`, bound to the exact bytes of `config`.
pub(crate) fn add(
    store: &dyn Store,
    repository: RepoId,
    config: &[u8],
    keys: &DataKeys,
    secret: &Secret,
) -> Result<ObjectKey, RepoError> {
    let what = "store a key of the repository";
    let kdf = match secret {
        Secret::Passphrase(text) if text.is_empty() => {
            return Err(RepoError::usage(what, "the passphrase is empty"));
        }
        Secret::KeyFile(bytes) if bytes.len() < KEY_FILE_LEN_MIN => {
            return Err(RepoError::usage(
                what,
                "a key file must have at least 32 bytes",
            ));
        }
        Secret::Passphrase(_) => ARGON,
        Secret::KeyFile(_) => Kdf::Blake3,
    };
    let (salt, nonce) = (random::<16>(), random::<12>());
    let wrap = wrapping_key(kdf, secret, &salt).map_err(|flaw| RepoError::damaged(what, flaw))?;
    let mut text = Zeroizing::new([keys.id.as_slice(), keys.seal.0.as_slice()].concat());
    let tag = aead_key(&wrap)
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(wrap_aad(config)),
            &mut text,
        )
        .expect("AES-GCM takes 64 bytes");
    let wire = Wire {
        version: 1,
        repository,
        kdf,
        salt: to_hex(&salt),
        nonce: to_hex(&nonce),
        wrapped: to_hex(&[text.as_slice(), tag.as_ref()].concat()),
    };
    let body = serde_json::to_vec(&wire).expect("a struct of plain fields becomes JSON");
    let name = blake3::hash(&body).to_hex();
    let key = ObjectKey::new(ObjectKind::Key, name.as_str()).expect("hexadecimal is a good name");
    store
        .put(&key, &[&body])
        .map_err(|error| RepoError::store(what, error))?;
    Ok(key)
}

/// Returns of which kinds the stored keys are.
pub(crate) fn kinds(store: &dyn Store, repository: RepoId) -> Result<Vec<SecretKind>, RepoError> {
    let (wires, _) = read_all(store, repository)?;
    let mut kinds: Vec<_> = wires.iter().map(|wire| wire.kdf.kind()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    Ok(kinds)
}

/// Unwraps the repository's keys with the secret, whichever stored key it fits.
pub(crate) fn unlock(
    store: &dyn Store,
    repository: RepoId,
    config: &[u8],
    secret: &Secret,
) -> Result<DataKeys, RepoError> {
    let (wires, flaw) = read_all(store, repository)?;
    if let (true, Some(flaw)) = (wires.is_empty(), flaw) {
        return Err(RepoError::damaged("read the keys of the repository", flaw));
    }
    let mut candidates: Vec<&Wire> = wires
        .iter()
        .filter(|wire| wire.kdf.kind() == secret.kind())
        .collect();
    // The cheap ones first, so that nobody's expensive key spends the time that
    // is meant for ours.
    candidates.sort_by_key(|wire| wire.kdf.work_kib());
    let (mut work_kib, mut tried) = (0_u64, false);
    let mut flaw = flaw;
    for wire in candidates {
        work_kib = work_kib.saturating_add(wire.kdf.work_kib());
        if !wire.kdf.is_reasonable() || work_kib > WORK_KIB_MAX_TOTAL {
            flaw = Some(UNREASONABLE);
            continue;
        }
        tried = true;
        if let Ok(keys) = unwrap(wire, config, secret) {
            return Ok(keys);
        }
    }
    if let (false, Some(flaw)) = (tried, flaw) {
        return Err(RepoError::damaged("read the keys of the repository", flaw));
    }
    let why = match flaw {
        Some(_) => "no undamaged key fits this secret, and some keys are damaged",
        None => "no key fits this secret, or `config` was tampered with",
    };
    Err(RepoError::new(RepoErrorKind::WrongKey, "unlock the repository").because(why))
}

/// Reads the keys of this repository; damaged ones are left out and reported.
fn read_all(store: &dyn Store, repository: RepoId) -> Result<(Vec<Wire>, Option<Flaw>), RepoError> {
    let failed = |error| RepoError::store("read the keys of the repository", error);
    let mut wires = Vec::new();
    let mut flaw = None;
    for listed in store
        .list(ObjectKind::Key, "")
        .map_err(failed)?
        .into_iter()
        .take(KEYS_MAX)
    {
        let body = store.get(&listed.key, KEY_LEN_MAX).map_err(failed)?;
        match parse(&body, listed.key.name()) {
            // An `init` that lost a race leaves a key of a repository that
            // never came to be.
            Ok(wire) if wire.repository == repository => wires.push(wire),
            Ok(_) => {}
            Err(found) => flaw = Some(found),
        }
    }
    Ok((wires, flaw))
}

/// A stored key as it looks without any secret.
pub(crate) enum KeyState {
    /// What was written, for this repository.
    Ours,
    /// Undamaged, and of a repository that never came to be.
    Foreign,
    /// Not what was written.
    Damaged(Flaw),
}

/// Says what each stored key is worth; opens none.
pub(crate) fn inspect(
    store: &dyn Store,
    repository: RepoId,
) -> Result<Vec<(ObjectKey, KeyState)>, StoreError> {
    let mut states = Vec::new();
    for Listed { key, .. } in store.list(ObjectKind::Key, "")? {
        let state = match store.get(&key, KEY_LEN_MAX) {
            Ok(body) => match parse(&body, key.name()) {
                Ok(wire) if wire.repository == repository => KeyState::Ours,
                Ok(_) => KeyState::Foreign,
                Err(flaw) => KeyState::Damaged(flaw),
            },
            Err(error) if error.kind() == StoreErrorKind::TooLarge => {
                KeyState::Damaged(Flaw("it is longer than any key"))
            }
            // Removed since it was listed.
            Err(error) if error.kind() == StoreErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        states.push((key, state));
    }
    Ok(states)
}

fn parse(body: &[u8], name: &str) -> Result<Wire, Flaw> {
    if blake3::hash(body).to_hex().as_str() != name {
        return Err(Flaw("a key's hash does not match its name"));
    }
    let wire: Wire = serde_json::from_slice(body).map_err(|_| Flaw("a key is not understood"))?;
    if wire.version != 1 {
        return Err(Flaw("a key has an unknown version"));
    }
    Ok(wire)
}

/// Takes any bytes as a key object, for a fuzzer; tries it if that is little work.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(repository: RepoId, body: &[u8]) {
    const LITTLE_KIB: u64 = 256;
    let Ok(wire) = parse(body, blake3::hash(body).to_hex().as_str()) else {
        return;
    };
    let again = serde_json::to_vec(&wire).expect("a struct of plain fields becomes JSON");
    let name = blake3::hash(&again).to_hex();
    assert!(parse(&again, name.as_str()).is_ok_and(|again| again.kdf == wire.kdf));
    let secret = match wire.kdf {
        Kdf::Argon2id { .. } => Secret::Passphrase(b"a good one".to_vec().into()),
        Kdf::Blake3 => Secret::KeyFile(vec![0x5a; KEY_FILE_LEN_MIN].into()),
    };
    let is_ours = wire.repository == repository;
    if is_ours && (!wire.kdf.is_reasonable() || wire.kdf.work_kib() <= LITTLE_KIB) {
        assert!(
            unwrap(&wire, b"config", &secret).is_err(),
            "a key was guessed"
        );
    }
}

fn unwrap(wire: &Wire, config: &[u8], secret: &Secret) -> Result<DataKeys, Flaw> {
    let salt = array_from_hex::<16>(&wire.salt)?;
    let nonce = Nonce::assume_unique_for_key(array_from_hex::<12>(&wire.nonce)?);
    let mut wrapped = Zeroizing::new(array_from_hex::<80>(&wire.wrapped)?);
    let key = aead_key(&*wrapping_key(wire.kdf, secret, &salt)?);
    let plain = key
        .open_in_place(nonce, Aad::from(wrap_aad(config)), wrapped.as_mut_slice())
        .map_err(|_| Flaw("the secret does not fit"))?;
    let (id, seal) = plain
        .split_first_chunk::<32>()
        .ok_or(Flaw("the wrapped keys are short"))?;
    let seal =
        <[u8; 32]>::try_from(seal as &[u8]).map_err(|_| Flaw("the wrapped keys are short"))?;
    Ok(DataKeys {
        id: Zeroizing::new(*id),
        seal: SealKey(Zeroizing::new(seal)),
    })
}

/// The configuration is authenticated by every key: changed, it opens with none.
fn wrap_aad(config: &[u8]) -> Vec<u8> {
    [WRAP_CONTEXT, blake3::hash(config).as_bytes()].concat()
}

fn wrapping_key(kdf: Kdf, secret: &Secret, salt: &[u8]) -> Result<Zeroizing<[u8; 32]>, Flaw> {
    match (kdf, secret) {
        (
            Kdf::Argon2id {
                memory_kib,
                passes,
                lanes,
            },
            Secret::Passphrase(text),
        ) => {
            if !kdf.is_reasonable() {
                return Err(UNREASONABLE);
            }
            let params = Params::new(memory_kib, passes, lanes, Some(32))
                .map_err(|_| Flaw("a key has impossible parameters"))?;
            let mut key = Zeroizing::new([0; 32]);
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_into(text, salt, key.as_mut_slice())
                .map_err(|_| Flaw("a key has impossible parameters"))?;
            Ok(key)
        }
        (Kdf::Blake3, Secret::KeyFile(bytes)) => {
            let mut hasher = blake3::Hasher::new_derive_key(KEY_FILE_CONTEXT);
            hasher.update(bytes);
            hasher.update(salt);
            let key = Zeroizing::new(*hasher.finalize().as_bytes());
            hasher.zeroize();
            Ok(key)
        }
        (Kdf::Argon2id { .. }, Secret::KeyFile(_)) | (Kdf::Blake3, Secret::Passphrase(_)) => {
            Err(Flaw("the secret is of another kind"))
        }
    }
}
