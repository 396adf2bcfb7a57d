#![allow(clippy::unwrap_used)]
use super::*;
use model::JobId;

#[test]
fn times_round_trip_and_nothing_else_is_accepted() {
    for seconds in [0, 951_782_400, 951_868_799, 1_795_384_587, 4_107_542_400, 253_402_300_799] {
        let time = Time(Timestamp(seconds * Timestamp::SECOND));
        assert_eq!(time.to_string().parse(), Ok(time));
    }
    let mut seconds = 0;
    while seconds < 253_402_300_799 {
        let time = Time(Timestamp(seconds * Timestamp::SECOND));
        assert_eq!(time.to_string().parse(), Ok(time));
        seconds += 12_345_679;
    }
    for bad in [
        "",
        "2026-11-22",
        "2026-11-22T21:56:27",
        "2026-11-22T21:56:27+00:00",
        "2026-13-22T21:56:27Z",
        "2026-02-29T21:56:27Z",
        "2026-11-22T24:56:27Z",
        "1969-11-22T21:56:27Z",
        "+026-11-22T21:56:27Z",
        "2026-11-22T21:56:2éZ",
    ] {
        assert!(bad.parse::<Time>().is_err(), "{bad}");
    }
}

#[test]
fn a_limit_holds_in_its_hours_only() {
    let weekdays = [true, true, true, true, true, false, false];
    let limit = |from_minute, to_minute| RateLimit {
        bytes_per_second: 7,
        hours: Some(LimitHours { days: weekdays, from_minute, to_minute, offset_seconds: 3_600 }),
    };
    let at = |text: &str| text.parse::<Time>().unwrap().0;
    let day = limit(480, 1_080);
    // 2026-11-22 is a Sunday.
    assert_eq!(day.at(at("2026-11-22T10:00:00Z")), None);
    assert_eq!(day.at(at("2026-11-23T06:59:59Z")), None);
    assert_eq!(day.at(at("2026-11-23T07:00:00Z")), Some(7));
    assert_eq!(day.at(at("2026-11-23T17:00:00Z")), None);
    let night = limit(1_320, 360);
    assert_eq!(night.at(at("2026-11-27T22:00:00Z")), Some(7), "Friday 23:00");
    assert_eq!(night.at(at("2026-11-28T04:00:00Z")), Some(7), "Saturday 05:00 belongs to Friday's night");
    assert_eq!(night.at(at("2026-11-28T22:00:00Z")), None, "Saturday 23:00");
}

#[test]
fn a_job_carries_only_the_figures_it_counts() {
    let job = Job {
        id: JobId([1; 16]),
        kind: JobKind::Synchronize,
        state: JobState::Succeeded,
        datasource: None,
        datasource_name: None,
        created_at: Time(Timestamp(0)),
        started_at: None,
        ended_at: None,
        warnings: vec![],
        problem: None,
        figures: Figures { bytes_read: Some(5), already: Some(true), ..Figures::default() },
    };
    let text = serde_json::to_string(&job).unwrap();
    assert_eq!(
        text,
        r#"{"id":"01010101010101010101010101010101","kind":"synchronize","state":"succeeded","created_at":"1970-01-01T00:00:00Z","bytes_read":5,"already":true}"#
    );
    assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), job);
}

#[test]
fn exit_status_of_a_job_follows_state_problem_and_warnings() {
    let base =
        r#"{"id":"01010101010101010101010101010101","kind":"check","created_at":"1970-01-01T00:00:00Z","#;
    for (rest, status) in [
        (r#""state":"succeeded"}"#, 0),
        (r#""state":"cancelled"}"#, 130),
        (r#""state":"failed"}"#, 1),
        (r#""state":"failed","problem":{"code":"SP-3004","message":"m"}}"#, 10),
        (r#""state":"succeeded","warnings":[{"code":"SP-5006","message":"m"}]}"#, 3),
        (
            r#""state":"succeeded","warnings":[{"code":"SP-5006","message":"m"},{"code":"SP-3001","message":"m"}]}"#,
            6,
        ),
    ] {
        let job: Job = serde_json::from_str(&format!("{base}{rest}")).unwrap();
        assert_eq!(job.exit_status() as u8, status, "{rest}");
    }
}

#[test]
fn requests_refuse_unknown_fields() {
    assert!(serde_json::from_str::<Synchronize>(r#"{"changed_extend":[]}"#).is_err());
    assert!(serde_json::from_str::<Prune>(r#"{"keep":1}"#).is_err());
    assert!(serde_json::from_str::<RecoverTarget>(r#"{"on":"server","path":"/x","mode":1}"#).is_err());
    assert_eq!(serde_json::from_str::<MakeToken>("{}").unwrap().count, 1);
}
