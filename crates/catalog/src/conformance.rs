//! Checks that every [`Catalog`] must pass. `make` gives a fresh, empty one at each call.
#![allow(clippy::unwrap_used, missing_docs)]

use crate::{AlertRow, Catalog, Derived, Filter, JobRow, Row, SessionRow, Table};

/// All checks.
pub fn all<C: Catalog>(make: impl Fn() -> C) {
    derived_tables_are_replaced_as_a_whole_or_by_row(&make());
    equal_tables_give_equal_dumps(&make(), &make());
    an_update_clears_only_what_it_names(&make());
    lists_come_in_pages(&make());
    history_survives_a_replacement(&make());
    jobs_are_filtered_and_paged(&make());
    logs_count_by_job(&make());
    alerts_get_numbers(&make());
}

fn row(key: &str, owner: &str, order: u64) -> Row {
    Row { key: key.into(), owner: owner.into(), order, json: format!("{{\"k\":\"{key}\"}}") }
}

pub fn derived_tables_are_replaced_as_a_whole_or_by_row(catalog: &dyn Catalog) {
    catalog.put(Table::Points, &[row("a", "m", 2), row("b", "m", 1)]).unwrap();
    catalog.put(Table::Points, &[row("a", "n", 3)]).unwrap();
    assert_eq!(catalog.get(Table::Points, "a").unwrap(), Some(row("a", "n", 3)));
    catalog.remove(Table::Points, "b").unwrap();
    catalog.remove(Table::Points, "b").unwrap();
    assert_eq!(catalog.get(Table::Points, "b").unwrap(), None);
    let derived = Derived { rows: vec![(Table::Hosts, row("h", "", 0)), (Table::Settings, row("s", "", 0))] };
    catalog.replace_derived(&derived).unwrap();
    assert_eq!(catalog.get(Table::Points, "a").unwrap(), None);
    assert_eq!(catalog.get(Table::Hosts, "h").unwrap(), Some(row("h", "", 0)));
}

pub fn equal_tables_give_equal_dumps(one: &dyn Catalog, other: &dyn Catalog) {
    let mut rows: Vec<(Table, Row)> = Table::ALL
        .iter()
        .flat_map(|&table| {
            (0..20).map(move |at| (table, row(&format!("k{at}"), &format!("o{}", at % 3), at)))
        })
        .collect();
    one.replace_derived(&Derived { rows: rows.clone() }).unwrap();
    rows.reverse();
    for (table, row) in &rows {
        let old = Row { json: "old\n\"".into(), ..row.clone() };
        other.put(*table, &[old]).unwrap();
        other.put(*table, std::slice::from_ref(row)).unwrap();
    }
    assert_eq!(one.derived_dump().unwrap(), other.derived_dump().unwrap());
    other.remove(Table::Hosts, "k7").unwrap();
    assert_ne!(one.derived_dump().unwrap(), other.derived_dump().unwrap());
}

pub fn an_update_clears_only_what_it_names(catalog: &dyn Catalog) {
    let old = [
        (Table::Hosts, row("h", "", 0)),
        (Table::Points, row("p1", "m", 1)),
        (Table::Points, row("p2", "m", 2)),
    ];
    catalog.replace_derived(&Derived { rows: old.to_vec() }).unwrap();
    let changed = Row { json: "\"changed\"".into(), ..row("p2", "m", 2) };
    let new = [(Table::Settings, row("s", "", 0)), (Table::Points, changed.clone())];
    catalog.update_derived(&[Table::Hosts, Table::Settings], &Derived { rows: new.to_vec() }).unwrap();
    assert_eq!(catalog.get(Table::Hosts, "h").unwrap(), None);
    assert_eq!(catalog.get(Table::Points, "p1").unwrap(), Some(row("p1", "m", 1)));
    assert_eq!(catalog.get(Table::Points, "p2").unwrap(), Some(changed));
    assert_eq!(catalog.get(Table::Settings, "s").unwrap(), Some(row("s", "", 0)));
}

pub fn lists_come_in_pages(catalog: &dyn Catalog) {
    let rows: Vec<Row> =
        (0..250).map(|at| row(&format!("k{at:03}"), ["m", "n"][at % 2], at as u64 / 10)).collect();
    catalog.put(Table::Points, &rows).unwrap();
    for owner in [None, Some("m")] {
        let mut seen: Vec<Row> = Vec::new();
        loop {
            let after = seen.last().map(|row| (row.order, row.key.clone()));
            let page = catalog
                .list(Table::Points, owner, after.as_ref().map(|(order, key)| (*order, key.as_str())), 100)
                .unwrap();
            if page.is_empty() {
                break;
            }
            seen.extend(page);
        }
        let expected: Vec<Row> =
            rows.iter().filter(|row| owner.is_none_or(|owner| row.owner == owner)).cloned().collect();
        assert_eq!(seen, expected);
    }
}

pub fn history_survives_a_replacement(catalog: &dyn Catalog) {
    let job = JobRow { id: "j".into(), created: 5, state: "running".into(), ..JobRow::default() };
    catalog.put_job(&job).unwrap();
    let session = SessionRow { id: "s".into(), json: "{}".into() };
    catalog.put_session(&session).unwrap();
    catalog.replace_derived(&Derived::default()).unwrap();
    assert_eq!(catalog.job("j").unwrap(), Some(job));
    assert_eq!(catalog.sessions().unwrap(), [session]);
    catalog.export_history().unwrap();
}

pub fn jobs_are_filtered_and_paged(catalog: &dyn Catalog) {
    for at in 0..30u64 {
        let state = if at % 3 == 0 { "failed" } else { "succeeded" }.to_owned();
        let id = format!("{at:04}");
        catalog.put_job(&JobRow { id, created: at / 2, state, ..JobRow::default() }).unwrap();
    }
    let ids = |filter, before, limit| -> Vec<String> {
        catalog.jobs(filter, before, limit).unwrap().into_iter().map(|job| job.id).collect()
    };
    assert_eq!(ids(Filter::default(), None, 3), ["0029", "0028", "0027"]);
    assert_eq!(ids(Filter::default(), Some((14, "0028")), 2), ["0027", "0026"]);
    assert_eq!(ids(Filter { failed: true, since: 12 }, None, 9), ["0027", "0024"]);
    assert_eq!(catalog.jobs_with_prefix("0007").unwrap(), ["0007"]);
    assert_eq!(catalog.jobs_with_prefix("00").unwrap().len(), 2);
    assert!(catalog.jobs_with_prefix("x").unwrap().is_empty());
}

pub fn logs_count_by_job(catalog: &dyn Catalog) {
    for line in 1..=5 {
        assert_eq!(catalog.log("a", line * 10, "info", "x").unwrap(), line);
    }
    assert_eq!(catalog.log("b", 1, "error", "y").unwrap(), 1);
    let lines = catalog.log_lines("a", 2, 2).unwrap();
    assert_eq!(lines.iter().map(|line| (line.line, line.time)).collect::<Vec<_>>(), [(3, 30), (4, 40)]);
}

pub fn alerts_get_numbers(catalog: &dyn Catalog) {
    let new = AlertRow { number: 0, acknowledged: false, json: "{}".into() };
    assert_eq!(catalog.put_alert(&new).unwrap(), 1);
    assert_eq!(catalog.put_alert(&new).unwrap(), 2);
    let done = AlertRow { number: 1, acknowledged: true, json: "{}".into() };
    assert_eq!(catalog.put_alert(&done).unwrap(), 1);
    let numbers = |every, before| -> Vec<u64> {
        catalog.alerts(every, before, 9).unwrap().iter().map(|alert| alert.number).collect()
    };
    assert_eq!(numbers(true, None), [2, 1]);
    assert_eq!(numbers(false, None), [2]);
    assert_eq!(numbers(true, Some(2)), [1]);
    assert_eq!(catalog.alert(1).unwrap(), Some(done));
    assert_eq!(catalog.alert(9).unwrap(), None);
}
