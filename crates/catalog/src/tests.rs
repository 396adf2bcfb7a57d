#![allow(clippy::unwrap_used)]
use super::*;

fn filled(folder: &Path) -> String {
    let opened = SqliteCatalog::open(folder).unwrap();
    let catalog = opened.catalog;
    let row = Row { key: "k".into(), owner: "o".into(), order: 1, json: "{}".into() };
    catalog.put(Table::Points, &[row]).unwrap();
    catalog.put_job(&JobRow { id: "j1".into(), created: 1, ..JobRow::default() }).unwrap();
    catalog.log("j1", 2, "info", "said").unwrap();
    let dump = catalog.derived_dump().unwrap();
    catalog.close().unwrap();
    dump
}

#[test]
fn passes_the_conformance_checks() {
    let folders = tempfile::tempdir().unwrap();
    let count = std::sync::atomic::AtomicU32::new(0);
    crate::conformance::all(|| {
        let folder = folders.path().join(count.fetch_add(1, std::sync::atomic::Ordering::SeqCst).to_string());
        fs::create_dir(&folder).unwrap();
        SqliteCatalog::open(&folder).unwrap().catalog
    });
}

#[test]
fn a_clean_close_is_believed_and_keeps_everything() {
    let folder = tempfile::tempdir().unwrap();
    let dump = filled(folder.path());
    assert!(!folder.path().join("catalog.db-wal").exists());
    let opened = SqliteCatalog::open(folder.path()).unwrap();
    assert_eq!((opened.rebuilt, opened.mended, opened.clean), (None, None, true));
    assert_eq!(opened.catalog.derived_dump().unwrap(), dump);
    assert!(!folder.path().join(DIGEST).exists(), "an old digest must not meet a newer database");
}

#[test]
fn a_flipped_bit_in_any_file_is_noticed_and_history_is_salvaged() {
    let master = tempfile::tempdir().unwrap();
    filled(master.path());
    let mut flips = 0;
    for name in [DATABASE, DIGEST, EXPORT] {
        let bytes = fs::read(master.path().join(name)).unwrap();
        // Every byte of the small files; of the database its head and a walk through its pages, all eight bits in turn.
        let step = if name == DATABASE { 997 } else { 7 };
        for at in (0..bytes.len()).step_by(step) {
            let folder = tempfile::tempdir().unwrap();
            for file in [DATABASE, DIGEST, EXPORT] {
                fs::copy(master.path().join(file), folder.path().join(file)).unwrap();
            }
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (flips % 8);
            fs::write(folder.path().join(name), bad).unwrap();
            let opened = SqliteCatalog::open(folder.path()).unwrap();
            if name == EXPORT {
                assert!(opened.mended.is_some() && opened.rebuilt.is_none(), "{name} byte {at}");
            } else {
                assert!(opened.rebuilt.is_some(), "{name} byte {at}");
                assert!(folder.path().join("catalog.damaged-1").exists());
                assert_eq!(opened.catalog.derived_dump().unwrap(), "", "the caller fills it from the pool");
            }
            assert_eq!(opened.catalog.log_lines("j1", 0, 9).unwrap().len(), 1, "history is there");
            flips += 1;
        }
    }
    assert!(flips > 50);
}

#[test]
fn a_crash_leaves_what_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let opened = SqliteCatalog::open(folder.path()).unwrap();
    opened.catalog.put_job(&JobRow { id: "j".into(), ..JobRow::default() }).unwrap();
    let copy = tempfile::tempdir().unwrap();
    for name in [DATABASE, "catalog.db-wal"] {
        fs::copy(folder.path().join(name), copy.path().join(name)).unwrap();
    }
    let again = SqliteCatalog::open(copy.path()).unwrap();
    assert_eq!((again.rebuilt, again.clean), (None, false));
    assert!(again.catalog.job("j").unwrap().is_some());
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    filled(folder.path());
    let database = folder.path().join(DATABASE);
    let connection = Connection::open(&database).unwrap();
    connection.execute_batch("PRAGMA user_version=2; PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    drop(connection);
    let digest = digest_of(&database).unwrap();
    fs::write(folder.path().join(DIGEST), &digest).unwrap();
    assert!(matches!(
        SqliteCatalog::open(folder.path()),
        Err(CatalogError::TooNew { found: 2, known: 1, .. })
    ));
    assert_eq!(digest_of(&database).unwrap(), digest);
}

#[test]
fn pages_of_a_long_history_use_an_index() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = SqliteCatalog::open(folder.path()).unwrap().catalog;
    catalog
        .read(|connection| {
            for sql in [
                "SELECT * FROM jobs WHERE created >= 1 AND (created, id) < (5, 'x') ORDER BY created DESC, id DESC LIMIT 100",
                "SELECT * FROM points WHERE owner = 'o' AND (ord, key) > (1, 'x') ORDER BY ord, key LIMIT 100",
                "SELECT * FROM points WHERE (ord, key) > (1, 'x') ORDER BY ord, key LIMIT 100",
            ] {
                let plan = all(connection, &format!("EXPLAIN QUERY PLAN {sql}"), [], |row| row.get::<_, String>(3))?;
                let plan = plan.join("; ");
                assert!(plan.contains("USING INDEX") && !plan.contains("TEMP B-TREE"), "{sql}: {plan}");
            }
            Ok(())
        })
        .unwrap();
}
